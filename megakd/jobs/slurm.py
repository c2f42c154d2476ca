"""What SLURM says about its partitions and jobs: few calls, none longer than a minute."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

SLURM_SECONDS = 60.0
# Of a job that waits, runs, or comes back.
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "PREEMPTED")


@dataclass(frozen=True)
class JobState:
    """A job as SLURM sees it. reason: why it waits; since: its newest start, in local time; code: its exit code, where SLURM says."""

    name: str
    reason: str = ""
    since: str = ""
    code: int | None = None

    @property
    def ended(self) -> bool:
        return self.name not in UNFINISHED


@dataclass(frozen=True)
class Nodes:
    """Equal nodes of one partition."""

    partition: str
    default: bool
    count: int
    cpus: str
    memory_mb: str
    gpus: int

    def __str__(self) -> str:
        return f"{self.partition}: {self.count} nodes with {self.gpus} GPUs, {self.cpus} CPUs, {self.memory_mb} MB each"


def check(partition: str | None, nodes: int, gpus_per_node: int | None, there: list[Nodes] | None = None) -> None:
    """Raise ValueError where SLURM does not answer, lacks a partition, or has too few nodes with so many GPUs in it, for which sbatch would
    let a job wait for ever.

    partition: as for sbatch, also several with commas, of which one has to do. gpus_per_node: None will do where there are none. there: of
    `partitions`, None to call it.
    """
    there = partitions() if there is None else there
    wanted = partition.split(",") if partition else [group.partition for group in there if group.default]
    for name in wanted:
        if name not in {group.partition for group in there}:
            raise ValueError(f"--partition {name}: this cluster has no such partition; it has\n{listing(there)}")
    idle = [group for group in there if group.partition in wanted and group.gpus]
    if gpus_per_node is None and idle:
        raise ValueError(f"--gpus_per_node: say how many, 0 to train on the CPU; there are\n{listing(idle)}")
    for name in wanted:
        if sum(group.count for group in there if group.partition == name and group.gpus >= (gpus_per_node or 0)) >= nodes:
            return
    if not wanted:
        return
    what = f"--nodes {nodes} --gpus_per_node {gpus_per_node or 0}"
    raise ValueError(f"{what}: partition {','.join(wanted)} does not have {nodes} nodes of so many GPUs; there are\n{listing(there)}")


def partitions() -> list[Nodes]:
    """What `sinfo` shows, hidden partitions too. Raises ValueError where it does not run."""
    rows = [line.split("|") for line in _ask("sinfo", "--all", "--noheader", "--format=%P|%D|%c|%m|%G").splitlines()]
    return [
        Nodes(name.strip().rstrip("*"), name.strip().endswith("*"), int(count), cpus.strip(), memory.strip(), _gpus(gres))
        for name, count, cpus, memory, gres in rows
    ]


def listing(nodes: Iterable[Nodes]) -> str:
    return "\n".join(f"  {group}" for group in nodes)


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """State of each job that SLURM knows: one `squeue` for all, then one `sacct` for those that have ended.

    Raises ValueError where squeue does not run. Without accounting the ended ones are as squeue has them, or left out.
    """
    if not (ids := sorted(set(jobs))):
        return {}
    queued = ["squeue", "--array", "--noheader", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%T|%S|%r"]
    known = {}
    for line in _ask(*queued, unless="Invalid job id").splitlines():
        job, name, since, reason = line.split("|", 3)
        known[job] = JobState(name, "" if reason == "None" else reason, since)
    # an ended job's exit code is not in squeue
    if ended := [job for job in ids if job not in known or known[job].ended]:
        accounted = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(ended)}", "--format=JobID,State,ExitCode"]
        rows = ""
        with contextlib.suppress(ValueError):  # no accounting here
            rows = _ask(*accounted)
        for job, name, code in (line.split("|") for line in rows.splitlines()):
            known[job] = JobState(name.split()[0], code=int(code.split(":")[0]))  # "CANCELLED by 1000"
    return {job: known[job] for job in ids if job in known}


def _gpus(gres: str) -> int:
    """GPUs of "gpu:8", "gpu:a100:4(S:0),gpu:h100:4" or "(null)"."""
    return sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", gres))


def _ask(*command: str, unless: str | None = None) -> str:
    """Standard output; empty when the command fails with `unless` in its message."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS, check=False)
    except FileNotFoundError:
        raise ValueError(f"{command[0]}: no SLURM on this machine; submit on a login node, or run here with --cluster local") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]}: no answer from SLURM in {SLURM_SECONDS:.0f} s; try again later") from None
    if done.returncode and not (unless and unless in done.stderr):
        raise ValueError(f"{command[0]}: SLURM does not answer:\n{done.stderr.strip()}\nor run on this machine with --cluster local")
    return "" if done.returncode else done.stdout
