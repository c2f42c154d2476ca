"""Counts of what ZeRO-3 gathers for a frozen module's forwards: how much of it was asked for before it was needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Gathered:
    """Groups of weights that are gathered for each forward. gathers_ahead: there when they were needed, or on their way beside what was
    computed before; gathers_late: asked for only then, and waited for from the beginning."""

    gathers_ahead: int = 0
    gathers_late: int = 0

    def taken(self) -> Gathered:
        """The counts, which begin anew."""
        counts = Gathered(self.gathers_ahead, self.gathers_late)
        self.gathers_ahead = self.gathers_late = 0
        return counts

    @classmethod
    def of(cls, several: Iterable[Gathered]) -> Gathered:
        """Their sum."""
        parts = list(several)
        return cls(sum(one.gathers_ahead for one in parts), sum(one.gathers_late for one in parts))
