"""What a plan says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megakd.planning import rates
from megakd.planning.cluster import Cluster
from megakd.planning.modes import PlannedJob, Row


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
