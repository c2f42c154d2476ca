"""How a step of the real trainer grows with shards, questions, ranks and batch, and a start's time and memory with the first two.

1. Each point of an axis is a run of `megakd/train.py` on tiny towers, killed after its timed steps: all that is not a tower shows.
2. Its rows of metrics.jsonl tell a step's processor and wall time; a point is the median of its steps after the warm-up.
3. An exponent is fitted to all points of all rounds in the logarithms, with its interval, and compared with what is expected.

The measure is the processor time of rank 0: cores may be shared, by ranks among themselves too, and waiting is not growth. Loaders have no
workers, so that reading counts in it. A loss over all pairs of a batch grows with its square by what it is, so the batch's exponent is that
of a step without it; it is told beside, and for that a batch goes through the student in two micro-batches: otherwise the loss's backward
would count as the student's.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from megakd.benchmarks import growth_figure, growth_fit
from megakd.benchmarks.common import comparison, side_by_side
from megakd.benchmarks.common.children import ended_by_sigterm
from megakd.benchmarks.common.side_by_side import START_SECONDS
from megakd.benchmarks.growth_fit import Kind, Power
from megakd.benchmarks.growth_material import PAIRS, PAIRS_A_SHARD, QUESTIONS, Material
from megakd.runtime.console import plain
from megakd.runtime.files import atomic_file
from megakd.runtime.run_folder import METRICS, read_metrics

TABLE = "growth.csv"
_STEP_SECONDS = 120  # limit of one step, on cores that others use


@dataclass(frozen=True)
class Axis:
    """One number that grows while the rest of a step stays. points: (value, warm-up steps, timed steps).

    starts: whether a start's time and memory may grow as well, and with what.
    """

    name: str
    points: tuple[tuple[int, int, int], ...]
    expected: Kind
    holds: str
    starts: bool = False

    def recipe(self, material: Material, value: int) -> dict[str, Any]:
        if self.name == "questions":
            return material.of_questions(value, QUESTIONS)
        if self.name == "shards":
            return material.of_pairs(value, PAIRS)
        batch = value if self.name == "batch" else PAIRS * value
        return material.of_pairs(max(1, 2 * batch // PAIRS_A_SHARD), batch)

    def config(self, value: int) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        return {"train_micro_batch_size_per_gpu": value // 2} if self.name == "batch" else {}

    def seconds(self, point: Point) -> float:
        """What the exponent is of."""
        return point.processor - point.loss if self.name == "batch" else point.processor


# Behind 30 steps the shuffle's window of 512 shards is open, as it is in the middle of an epoch.
AXES = (
    Axis("shards", tuple((10**power, 30, 60) for power in range(5)), "flat", f"{PAIRS} pairs a step", starts=True),
    Axis("questions", tuple((10**power, 10, 60) for power in (0, 2, 4, 5, 6)), "flat", f"{QUESTIONS} questions a step", starts=True),
    Axis("ranks", tuple((ranks, 10, 60) for ranks in (1, 2, 4)), "flat", f"{PAIRS} pairs a rank"),
    Axis(
        "batch",
        ((64, 10, 60), (256, 5, 25), (1024, 2, 8), (2048, 2, 6), (4096, 1, 4), (8192, 1, 3)),
        "linear",
        "one rank, without the loss",
    ),
)


@dataclass(frozen=True)
class Point:
    """One run. processor, wall: median seconds of a step of rank 0, processor by part too; memory: its peak in GB after the timed steps.

    start: processor seconds of all ranks before the first step, by their number.
    """

    axis: str
    value: int
    round: int
    processor: float
    wall: float
    data: float
    teacher: float
    student: float
    loss: float
    reduce: float
    update: float
    other: float
    start: float
    memory: float
    commit: str


PARTS = ("data", "teacher", "student", "loss", "reduce", "update", "other")


def run(names: Sequence[str], rounds: int, threads: int = 1, folder: Path | None = None, file: Path | None = None) -> None:
    """Measure the axes `names`, print a table, the exponents and verdicts, and one line of JSON.

    folder: growth.csv there gets the new points in the place of the same axes' old ones, and growth.svg and growth.png show all that it
    holds. Raises ValueError for an axis that is not known, and when a run fails, with its last lines.
    """
    chosen = [axis for axis in AXES if axis.name in names or not names]
    if unknown := sorted(set(names) - {axis.name for axis in AXES}):
        raise ValueError(f"--axis {unknown[0]}: one of {', '.join(axis.name for axis in AXES)}")
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-growth-") as name:
        points = measure(chosen, rounds, Material.write(Path(name)), Path(name), threads)
    console = plain()
    console.print(table(points))
    fits = {axis.name: fitted(axis, points) for axis in chosen}
    for axis in chosen:
        for line in said(axis, points, fits[axis.name]):
            console.print(f"- {line}", markup=False)
    where = comparison.conditions({"torch": torch.__version__}, threads)
    if folder is not None:
        every = [point for point in read(folder / TABLE) if point.axis not in fits] + points
        write(every, folder / TABLE)
        drawn = [axis for axis in AXES if any(point.axis == axis.name for point in every)]
        growth_figure.draw({axis.name: (axis.expected, axis.holds) for axis in drawn}, every, folder)
    verdicts = {name: asdict(fit) for name, fit in fits.items()}
    as_expected = {axis.name: fits[axis.name].is_as(axis.expected) for axis in chosen}
    row = {"benchmark": "bench growth", "exponents": verdicts, "as_expected": as_expected, "points": [asdict(point) for point in points]}
    comparison.record({**row, **where}, file)


def measure(axes: Sequence[Axis], rounds: int, material: Material, folder: Path, threads: int) -> list[Point]:
    """All points of all axes, round by round, so that a machine that becomes slower does so for every point."""
    points: list[Point] = []
    for number in range(rounds):
        for axis in axes:
            for value, warm_up, timed in axis.points:
                recipe, place = axis.recipe(material, value), folder / f"{axis.name}-{value}-{number}"
                ranks = value if axis.name == "ranks" else 1
                with side_by_side.training(recipe, place, threads, ranks=ranks, config=axis.config(value)) as child:
                    limit = START_SECONDS + _STEP_SECONDS * (warm_up + timed)
                    # the processor time is read while a run goes on: of a run that has ended nothing is left to read
                    first, busy = child.wait_for(lambda place=place: _first(place / "run", child.processor_seconds()), limit)  # type: ignore[misc]
                    rows = child.wait_for(lambda place=place, many=warm_up + timed: _rows(place / "run", many), limit)  # type: ignore[misc]
                start = busy / ranks - sum(sum(row["processor_seconds"].values()) for row in first)
                points.append(point(axis.name, value, number, rows[warm_up : warm_up + timed], start))
                shown = points[-1]
                print(f"round {number + 1}/{rounds}, {axis.name} {value}: {1000 * shown.processor:.1f} ms a step", flush=True)
    return points


def _rows(run: Path, many: int) -> list[dict[str, Any]] | None:
    """The rows of steps, once there are so many."""
    if not (run / METRICS).exists():
        return None
    rows = [row for row in read_metrics(run) if "processor_seconds" in row]
    return rows if len(rows) >= many else None


def _first(run: Path, busy: float) -> tuple[list[dict[str, Any]], float] | None:
    """The first rows, and what the processor time was just before they were read."""
    rows = _rows(run, 1)
    return None if rows is None else (rows, busy)


def point(axis: str, value: int, number: int, rows: list[dict[str, Any]], start: float) -> Point:
    """Of the timed rows of a run's metrics.jsonl."""
    parts = {name: median(row["processor_seconds"].get(name, 0.0) for row in rows) for name in PARTS}
    processor = median(sum(row["processor_seconds"].values()) for row in rows)
    wall, memory = median(sum(row["seconds"].values()) for row in rows), max(row["memory_gb"] for row in rows)
    commit = comparison.environment.commit() or ""
    return Point(axis, value, number, processor, wall, **parts, start=start, memory=memory, commit=commit)


def of(axis: Axis, points: Sequence[Point]) -> list[Point]:
    return [each for each in points if each.axis == axis.name]


def fitted(axis: Axis, points: Sequence[Point]) -> Power:
    own = of(axis, points)
    return growth_fit.power([each.value for each in own], [axis.seconds(each) for each in own])


def table(points: Sequence[Point]) -> Table:
    """Medians over the rounds."""
    made = Table(title="a step of rank 0, processor ms by part; wall ms; a start's processor s and its peak GB", title_justify="left")
    for column in ("axis", "value", "processor", *PARTS, "wall", "start s", "GB"):
        made.add_column(column, justify="left" if column == "axis" else "right")
    for axis, value in dict.fromkeys((each.axis, each.value) for each in points):
        rows = [each for each in points if (each.axis, each.value) == (axis, value)]

        def middle(name: str, rows: list[Point] = rows) -> float:
            return median(float(getattr(each, name)) for each in rows)

        times = (f"{1000 * middle(name):.1f}" for name in ("processor", *PARTS, "wall"))
        made.add_row(axis, f"{value:,}", *times, f"{middle('start'):.1f}", f"{middle('memory'):.2f}")
    return made


def said(axis: Axis, points: Sequence[Point], fit: Power) -> list[str]:
    """The verdict of an axis, what of a batch's time is quadratic, and what a start costs more for more shards or questions."""
    own, found = of(axis, points), "as expected" if fit.is_as(axis.expected) else "NOT as expected"
    values = sorted({each.value for each in own})
    middle = {value: median(axis.seconds(each) for each in own if each.value == value) for value in values}
    allowed = f"|exponent| <= {growth_fit.FLAT}" if axis.expected == "flat" else f"|exponent - 1| <= {growth_fit.LINEAR}"
    lines = [
        f"{axis.name} {values[0]:,} to {values[-1]:,} ({axis.holds}): a step grows as {axis.name} ^ {fit}, {axis.expected} ({allowed}) "
        f"{found}; {middle[values[-1]] / middle[values[0]]:.2f} times the time at {values[-1] / values[0]:,.0f} times the {axis.name}"
    ]
    if axis.name == "batch":
        numbers = [each.value for each in own]
        kinds = {
            "all but the loss": map(axis.seconds, own),
            "the loss": (each.loss for each in own),
            "a step": (each.processor for each in own),
        }
        for name, seconds in ((name, list(kind)) for name, kind in kinds.items()):
            power, parts = growth_fit.power(numbers, seconds), growth_fit.parts(numbers, seconds)
            terms = f"{1000 * parts.fixed:.1f} ms + {1e6 * parts.linear:.1f} us N + {1e9 * parts.quadratic:.2f} ns N^2"
            crossing = f", and as much as N at {parts.crossing:,.0f}" if parts.quadratic else ""
            share = f"{parts.quadratic_share(values[-1]):.0%} of it{crossing}"
            lines.append(f"{name} = {terms}; at N = {values[-1]:,} the square is {share}; N ^ {power} as a whole")
    if axis.starts:
        before, last = values[-2:]
        for name, unit, scale in (("start", "ms of a start's processor time", 1e3), ("memory", "MB of its peak", 1e3)):
            at = {value: median(getattr(each, name) for each in own if each.value == value) for value in (values[0], before, last)}
            late, early = (at[last] - at[before]) / (last - before), (at[before] - at[values[0]]) / (before - values[0])
            lines.append(
                f"{axis.name}: 1,000 more cost {1000 * scale * late:.3g} {unit} between {before:,} and {last:,}, "
                f"{1000 * scale * early:.3g} below: {'as many for each' if late <= 1.5 * max(early, 0) else 'more for each'}"
            )
    return lines


def write(points: Sequence[Point], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(each).items()} for each in points
        )


def read(path: Path) -> list[Point]:
    """What `write` left there; nothing where there is no such file."""
    if not path.exists():
        return []
    kinds = {"axis": str, "commit": str, "value": int, "round": int}
    with path.open(encoding="utf-8", newline="") as file:
        return [Point(**{name: kinds.get(name, float)(text) for name, text in row.items()}) for row in csv.DictReader(file)]
