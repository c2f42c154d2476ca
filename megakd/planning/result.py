"""What a plan is asked for, and what it says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megakd.planning import rates
from megakd.planning.modes import PlannedJob, Row

GB = 1_000_000_000
# CUDA's context and kernels (0.5 GB), NCCL's channels (up to 1 GB), cuBLAS and cuDNN workspaces; and what the caching allocator
# cannot use because it is in pieces. A margin, not a measurement: `torch.cuda.max_memory_allocated` has neither.
OUTSIDE, IN_PIECES = 2 * GB, 0.05


@dataclass(frozen=True)
class Cluster:
    """gpus: ranks. memory: GB of one. kind: a name of `rates.GPUS`; "cpu" plans fp32 teachers on CPU ranks."""

    gpus: int
    memory: float
    per_node: int = 8
    kind: str = "h100"

    def check(self) -> None:
        """Raises ValueError naming the flag."""
        rates.gpu(self.kind)
        for flag, value in (("--gpus", self.gpus), ("--gpu_memory", self.memory), ("--gpus_per_node", self.per_node)):
            if not value > 0:
                raise ValueError(f"{flag} {value}: give a positive number")

    @property
    def usable(self) -> float:
        """Bytes of one GPU that tensors may take."""
        if self.kind == "cpu":
            return self.memory * GB
        return (self.memory * GB - OUTSIDE) * (1 - IN_PIECES)


@dataclass(frozen=True)
class MemoryPlan:
    """A row a teacher mode. asked: the recipe's own mode. recommended: a mode's name, or None where nothing fits; why: a sentence."""

    job: PlannedJob
    cluster: Cluster
    rows: list[Row]
    asked: str
    recommended: str | None
    why: str

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(one), "mode": one.mode.name, "bytes": one.bytes, "fits": one.fits(self.cluster.usable)} for one in self.rows]
        assumptions = {
            name: getattr(rates, name) for name in dir(rates) if name.endswith(("_SHARE", "_SPEEDUP", "HOST_LINK", "HOST_MEMORY"))
        }
        return {
            "cluster": {**asdict(self.cluster), "usable_bytes": self.cluster.usable}, "job": asdict(self.job), "modes": rows,
            "asked": self.asked, "recommended": self.recommended, "why": self.why, "assumptions": assumptions,
        }  # fmt: skip
