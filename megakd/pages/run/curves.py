"""The figures of a run's page: its numbers by step. Starts after the first are dashed lines."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from megakd.pages.drawing import HEIGHT, INK, MUTED, Figure, colour
from megakd.pages.page import Figures
from megakd.pages.records import losses_of
from megakd.pages.run.reading import RunFiles
from megakd.pages.scores import known_scores
from megakd.pages.tables import DIAGNOSTICS

MOST_POINTS = 240  # of a curve; of longer ones each point is the median of its neighbours, in a band from the least to the most
MOST_SCORES = 12
MOST_LOGGED = 12
LOW = 2.5  # inches: of panels that stand in rows
_NAMED = frozenset((
    *("step", "loss", "losses", "backends", "lr", "scale", "gradient_norm", "images_per_second", "memory_gb", "seconds"),
    *("processor_seconds", "bad_samples"),
))  # fmt: skip

Points = Sequence[tuple[float, float]]
Series = tuple[str, int, Points]  # (label, place of its colour or ALONE, points)
ALONE = -1  # the colour of text, where the others of a row are those of a legend


def losses(run: RunFiles) -> tuple[Figures, Figures, Figures]:
    """The whole loss, what each objective adds to it, and each objective by itself."""
    names, marks = run.groups("losses"), run.resumed_at
    total = _panel("loss", "The loss that is trained", [("loss", ALONE, run.series("loss"))], "loss", marks)
    added = [(name, place, _weighted(run, name)) for place, name in enumerate(names)]
    weighted = _panel("weighted", "What each objective adds to it", added, "weight × loss", marks, named=True)
    raw = [
        _panel(f"raw_{place}", name, [(name, place, run.series("losses", name))], "unweighted", marks, height=LOW)
        for place, name in enumerate(names)
    ]
    several = len(names) > 1 or any(points != run.series("loss") for _, _, points in added)
    return (
        Figures("", _resumed(run), _there(total, weighted if several and _adds_up(run, added) else None)),
        Figures("Each objective by itself", "Without its weight.", _there(*raw) if len(names) > 1 else (), small=True),
        Figures("What the update goes by", "", updates(run), small=True),
    )


def updates(run: RunFiles) -> tuple[Figure, ...]:
    """Learning rate, gradient norm, logit scale, and every other number that the run's tasks log."""
    marks = run.resumed_at
    single = [
        _panel("rate", "Learning rate", [("lr", 0, run.series("lr"))], "", marks, height=LOW),
        _panel("norm", "Gradient norm", [("norm", 0, run.series("gradient_norm"))], "before clipping", marks, height=LOW, log=True),
        _panel("scale", "Logit scale", [("scale", 0, run.series("scale"))], "", marks, height=LOW),
    ]
    logged: list[tuple[str, ...]] = []
    for row in run.rows:
        for key, value in row.items():
            if key not in _NAMED:
                logged += [(key, name) for name in value] if isinstance(value, dict) else [(key,)]
    for place, keys in enumerate(list(dict.fromkeys(logged))[:MOST_LOGGED]):
        title = " ".join(keys)
        single.append(_panel(f"logged_{place}", title, [(title, 0, run.series(*keys))], "", marks, height=LOW))
    return _there(*single)


def speed(run: RunFiles) -> Figures:
    """Where the time of a step goes, images/s, memory."""
    marks, parts = run.resumed_at, run.groups("seconds")
    split: list[Series] = [(name, place, _milliseconds(run, name)) for place, name in enumerate(parts)]
    return Figures(
        "",
        "Time of a step by what it went to, without evaluations. "
        f"“data” is waiting for the loader, “other” what none of the parts covers, such as writing. {_resumed(run)}".strip(),
        _there(
            _stacked("time", "Time of a step", split, "ms", marks),
            _panel("throughput", "Images/s of training", [("images/s", 0, run.series("images_per_second"))], "images/s", marks, zero=True),
            _panel("memory", "Peak memory", [("GB", 0, run.series("memory_gb"))], "GB", marks, zero=True),
        ),
    )


def scores(run: RunFiles) -> Figures:
    """Evaluations by step, a panel for each score."""
    known = [one for one in known_scores(run.history) if len(run.history[one.path]) > 1][:MOST_SCORES]
    found = [
        _panel(f"score_{place}", one.title, [(one.title, 0, _percent(run, one.path))], "%", run.resumed_at, dots=True, height=LOW)
        for place, one in enumerate(known)
    ]
    return Figures("During training", _resumed(run), _there(*found), small=True)


def _percent(run: RunFiles, path: str) -> Points:
    factor = 1 if path.startswith(DIAGNOSTICS) else 100
    return [(step, factor * value) for step, value in run.history[path]]


def _weighted(run: RunFiles, name: str) -> Points:
    found = []
    for row in run.rows:
        value, weight = losses_of(row).get(name), run.weight(name, row)
        if isinstance(value, int | float) and weight is not None:
            found.append((row["step"], weight * value))
    return found


def _adds_up(run: RunFiles, added: Sequence[Series]) -> bool:
    """Whether the parts are the whole: else the recipe's weights are not those that the run had."""
    sums: dict[float, float] = {}
    for _, _, points in added:
        for step, value in points:
            sums[step] = sums.get(step, 0.0) + value
    whole = run.series("loss")
    return bool(whole) and all(math.isclose(sums.get(step, math.nan), value, rel_tol=1e-3, abs_tol=1e-6) for step, value in whole)


def _milliseconds(run: RunFiles, name: str) -> Points:
    steps = [0, *(row["step"] for row in run.rows)]
    before = dict(itertools.pairwise(steps))
    since = {after: first for first, after in before.items() if after > first}
    return [(step, 1000 * value / (step - since[step])) for step, value in run.series("seconds", name) if step in since]


def _resumed(run: RunFiles) -> str:
    if not run.resumed_at:
        return ""
    return f"Dashed: where a later start went on, step {', '.join(map(str, run.resumed_at))}."


def _there(*figures: Figure | None) -> tuple[Figure, ...]:
    return tuple(figure for figure in figures if figure is not None)


def _panel(
    key: str,
    title: str,
    series: Sequence[Series],
    unit: str,
    marks: Sequence[int],
    *,
    named: bool = False,
    zero: bool = False,
    log: bool = False,
    dots: bool = False,
    height: float = HEIGHT,
) -> Figure | None:
    """Lines by step; None without a point. named: with a legend; zero: from 0; log: on a logarithmic axis; dots: each point is seen."""
    drawn = [(label, place, points) for label, place, points in series if points]
    if not drawn:
        return None

    def draw(axes: Any) -> None:
        for _, place, points in drawn:
            steps, values, low, high = _thinned(points)
            if len(steps) < len(points):
                axes.fill_between(steps, low, high, color=_ink(place), alpha=0.18, linewidth=0)
            marker = "o" if dots or len(steps) < 3 else ""
            axes.plot(steps, values, color=_ink(place), marker=marker, markersize=3.5, linewidth=1.4)
        if log and all(value > 0 for _, _, points in drawn for _, value in points):
            _log_axis(axes, [value for _, _, points in drawn for _, value in points])
        elif zero:
            axes.set_ylim(bottom=0)
        _by_step(axes, marks, unit)

    ends = (
        f"{label} {points[0][1]:.4g} at step {points[0][0]:g}, {points[-1][1]:.4g} at step {points[-1][0]:g}" for label, _, points in drawn
    )
    legend = tuple((label, place) for label, place, _ in drawn) if named else ()
    return Figure(key, title, "; ".join(ends), draw, legend, height=height)


def _stacked(key: str, title: str, series: Sequence[Series], unit: str, marks: Sequence[int]) -> Figure | None:
    """Areas on top of each other, of the steps that all have; None where no two have one."""
    by_step = [(label, place, dict(points)) for label, place, points in series]
    steps = sorted(set.intersection(*(set(points) for _, _, points in by_step))) if by_step else []
    if len(steps) < 2:
        return None

    def draw(axes: Any) -> None:
        shown = [_thinned([(step, points[step]) for step in steps]) for _, _, points in by_step]
        axes.stackplot(
            shown[0][0], *(values for _, values, _, _ in shown), colors=[colour(place) for _, place, _ in by_step], alpha=0.85, linewidth=0
        )
        tops = sorted(sum(points[step] for _, _, points in by_step) for step in steps)
        axes.set_ylim(
            0, min(tops[-1], 1.25 * tops[int(0.95 * (len(tops) - 1))]) * 1.05 or 1.0
        )  # a first step may take a hundred times as long
        _by_step(axes, marks, unit)

    means = ", ".join(f"{label} {statistics.fmean(points[step] for step in steps):.3g} {unit}" for label, _, points in by_step)
    return Figure(key, title, f"in the mean {means}", draw, tuple((label, place) for label, place, _ in by_step))


def _ink(place: int) -> str:
    return INK if place == ALONE else colour(place)


def _by_step(axes: Any, marks: Sequence[int], unit: str) -> None:
    for step in marks:
        axes.axvline(step, color=MUTED, linestyle=(0, (3, 3)), linewidth=0.9)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.set_xlabel("step")
    if unit:
        axes.set_ylabel(unit)


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """Plain numbers at its ticks, which mathematical text would be drawn as it is written."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    narrow = max(values) < 30 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _thinned(points: Points) -> tuple[list[float], list[float], list[float], list[float]]:
    """(steps, medians, least, most) of as many runs of neighbours as a panel shows."""
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]

    def each(of: Callable[[list[float]], float]) -> list[float]:
        return [of([value for _, value in part]) for part in parts]

    return [statistics.median(step for step, _ in part) for part in parts], each(statistics.median), each(min), each(max)
