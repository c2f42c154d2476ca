"""What a job will run on. `megakd plan` has an option for each field, of which `metadata` tells the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

from megakd.planning import rates

GB = 1_000_000_000
# CUDA's context and kernels (0.5 GB), NCCL's channels (up to 1 GB), cuBLAS and cuDNN workspaces; and what the caching allocator
# cannot use because it is in pieces. A margin, not a measurement: `torch.cuda.max_memory_allocated` has neither.
OUTSIDE, IN_PIECES = 2 * GB, 0.05


@dataclass(frozen=True)
class Cluster:
    """gpus: ranks. memory: GB of one. kind: a name of `rates.GPUS`; "cpu" plans fp32 teachers on CPU ranks."""

    gpus: int = field(default=0, metadata={"help": "ranks of the job; several are compared by --sweep"})
    memory: float = field(default=0, metadata={"flag": "--gpu_memory", "help": "GB of one GPU"})
    per_node: int = field(default=8, metadata={"flag": "--gpus_per_node", "help": "GPUs that share fast links"})
    kind: str = field(default="h100", metadata={"flag": "--gpu", "help": f"whose speeds the times assume: {', '.join(rates.GPUS)}"})

    def check(self) -> None:
        """Raises ValueError naming the flag."""
        rates.gpu(self.kind)
        for flag, value in (("--gpus", self.gpus), ("--gpu_memory", self.memory), ("--gpus_per_node", self.per_node)):
            if not value > 0:
                several = ", or compare several by --sweep 8,64" if flag == "--gpus" else ""
                raise ValueError(f"{flag} {value:g}: give a positive number{several}")

    @property
    def usable(self) -> float:
        """Bytes of one GPU that tensors may take."""
        if self.kind == "cpu":
            return self.memory * GB
        return (self.memory * GB - OUTSIDE) * (1 - IN_PIECES)
