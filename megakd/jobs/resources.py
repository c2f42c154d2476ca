"""What a job requests of a cluster. `megakd submit` has an option for each field, described in its `metadata`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Resources:
    """In SLURM's words; None is the cluster's default."""

    nodes: int = field(default=1, metadata={"min": 1, "help": "machines"})
    gpus_per_node: int | None = field(default=None, metadata={"min": 0, "help": "GPUs of each, one rank a GPU; 0 trains on the CPU"})
    tasks_per_node: int | None = field(default=None, metadata={"min": 1, "help": "ranks of each; default: its GPUs, or 1"})
    cpus_per_task: int | None = field(default=None, metadata={"min": 1, "help": "CPUs a rank"})
    mem: str | None = field(default=None, metadata={"help": "memory a node, e.g. 480G"})
    partition: str | None = field(default=None, metadata={"help": "as sbatch's"})
    constraint: str | None = field(default=None, metadata={"help": "as sbatch's"})
    account: str | None = field(default=None, metadata={"help": "as sbatch's"})
    qos: str | None = field(default=None, metadata={"help": "as sbatch's"})
    time: str = field(
        default="24:00:00",
        metadata={"help": "limit of one stretch, in minutes or as sbatch's; the job is requeued after it"},
    )
    signal_delay: int = field(default=180, metadata={"min": 1, "help": "seconds before the limit to save at"})
    container_image: str | None = field(default=None, metadata={"help": "for srun with pyxis"})
    container_mounts: str | None = field(default=None, metadata={"help": "beside the current folder and the run's: SOURCE:TARGET,..."})
    setup: tuple[str, ...] = field(default=(), metadata={"metavar": "LINE", "help": "line of the batch script before srun; repeatable"})
    python: str | None = field(default=None, metadata={"help": "interpreter on the nodes; default: this one, in a container `python`"})

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node or 0)

    @property
    def minutes(self) -> int:
        """Raises ValueError where `time` is not one of SLURM's forms, or ends before the signal that asks for a checkpoint."""
        match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time)
        if not match:
            raise ValueError(f"--time {self.time}: write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS")
        days, first, second, third = (int(part or 0) for part in match.groups())
        if match[1] or match[4]:
            seconds = ((days * 24 + first) * 60 + second) * 60 + third
        else:
            seconds = first * 60 + second
        if seconds <= self.signal_delay:
            raise ValueError(f"--time {self.time}: no longer than --signal_delay {self.signal_delay} s, so nothing would be trained")
        return -(-seconds // 60)
