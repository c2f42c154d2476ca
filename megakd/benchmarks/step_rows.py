"""The rows of `megakd bench step`: which two sides each compares, what is asked of the ratio, and what was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table

from megakd.benchmarks.common.comparison import THEIRS
from megakd.benchmarks.common.side_by_side import Timed
from megakd.models.int8.agreement import Agreement

# Least share of rows and columns of the similarity matrix with the same largest entry, and least mean cosine, of an 8-bit teacher.
TOP1, COSINE = 0.99, 0.999


@dataclass(frozen=True)
class Row:
    """One comparison. side, other: names of sides; target: least ratio of processor times, in the median or in every round."""

    name: str
    side: str
    other: str
    target: float
    every_round: bool = False


ROWS = {
    row.name: row
    for row in (
        Row("float32", "float32", THEIRS, 1.05, every_round=True),
        Row("int8", "int8", THEIRS, 1.5),
        Row("store", "store", THEIRS, 2.0),
        Row("compiled", "compiled", "float32", 1.1),
    )
}


@dataclass(frozen=True)
class Outcome:
    """A row's ratios of every round, other / side: of the processor seconds of a step, and of a step's time on the wall."""

    row: Row
    processor: list[float]
    wall: list[float]
    quality: Agreement | None = None

    @property
    def judged(self) -> float:
        """The ratio that the target is compared with."""
        return min(self.processor) if self.row.every_round else median(self.processor)

    @property
    def agrees(self) -> bool:
        """Whether what a side computes in 8 bit is near enough; True where nothing is."""
        told = self.quality
        return told is None or (told.top1 is not None and told.top1 >= TOP1 and told.cosine >= COSINE)

    @property
    def reached(self) -> bool:
        return self.judged >= self.row.target and self.agrees

    @property
    def verdict(self) -> str:
        which = "least round" if self.row.every_round else "median"
        said = f"{'reached' if self.reached else 'missed'}: {which} {self.judged:.3f}, asked for {self.row.target:.2f}"
        if self.quality is None:
            return said
        held = "agrees" if self.agrees else "does not agree"
        return f"{said}; the teacher in 8 bit {held} (asked for: top-1 {TOP1}, cosine {COSINE}): {self.quality}"

    def to_json(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "side": self.row.side, "other": self.row.other, "target": self.row.target, "every_round": self.row.every_round,
            "processor": self.processor, "wall": self.wall, "judged": self.judged, "reached": self.reached,
        }  # fmt: skip
        if self.quality is not None:
            made["quality"] = {**vars(self.quality), "agrees": self.agrees}
        return made


def chosen(names: Sequence[str]) -> list[Row]:
    """Rows by name, in the order of `ROWS`; all without a name. Raises ValueError for an unknown one."""
    if unknown := [name for name in names if name not in ROWS]:
        raise ValueError(f"--rows {unknown[0]}: one of {', '.join(ROWS)}")
    return [row for name, row in ROWS.items() if name in names or not names]


def outcome(row: Row, sides: Mapping[str, Sequence[Timed]], quality: Agreement | None) -> Outcome:
    """sides: of every side what it did in each round."""
    rounds = list(zip(sides[row.side], sides[row.other], strict=True))
    processor = [other.processor_seconds / side.processor_seconds for side, other in rounds]
    wall = [median(side.rates) / median(other.rates) for side, other in rounds]
    return Outcome(row, processor, wall, quality)


def table(outcomes: Sequence[Outcome], sides: Mapping[str, Sequence[Timed]]) -> Table:
    """A line a row: both sides' medians, the ratios, those of single rounds, and whether the target is reached."""
    made = Table(title="bench step: seconds of a step, and ratios other / side", title_justify="left")
    for name in ("row", "side", "other", "processor s", "other", "ratio", "rounds", "wall ratio", "asked for", ""):
        made.add_column(name, justify="left" if name in ("row", "side", "rounds", "") else "right")
    for found in outcomes:
        row = found.row
        seconds = [median(each.processor_seconds for each in sides[name]) for name in (row.side, row.other)]
        rounds = " ".join(f"{ratio:.2f}" for ratio in found.processor)
        asked = f"{row.target:.2f}{' each' if row.every_round else ''}"
        numbers = (f"{seconds[0]:.2f}", f"{seconds[1]:.2f}", f"{median(found.processor):.3f}", rounds, f"{median(found.wall):.3f}")
        made.add_row(row.name, row.side, row.other, *numbers, asked, "reached" if found.reached else "missed")
    return made
