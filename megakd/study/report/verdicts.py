"""What became of a study's hypotheses: each is measured as its file said before the cells ran, and judged by the whole interval.

A hypothesis names a measure, the cells it is of (`only`, and `against_only` for those of `against`), and the threshold that the interval
has to exceed. It is open while one of its cells is still to come; failed cells are counted, and left out.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megakd.study.report.summary import Summary
from megakd.study.results import DONE, FAILED, Row
from megakd.study.statistics import Equivalence, Estimate, correlation_difference, equivalence, order, paired_gain

AXIS_OF = {"teachers": "teacher", "students": "student", "methods": "method", "steps": "steps", "data": "data", "seeds": "seed"}
BY_CELL = tuple[str | None, int | None]  # a teacher and a seed


@dataclass(frozen=True)
class Verdict:
    """holds: None is undecided. found: None without a number, of which `said` tells the reason. points: it is a difference of scores."""

    holds: bool | None
    found: Estimate | None
    said: str
    points: bool = False


def judged(summary: Summary, entry: Mapping[str, Any]) -> Verdict | None:
    """None where `entry` is measured in none of the ways that this module knows."""
    measure, threshold, method = entry.get("measure"), entry.get("threshold"), entry.get("method")
    score = next((one for one in summary.results.scores if one.name == entry.get("score")), summary.results.main)
    known = measure in ("order", "order_difference", "gain", "no_difference") and isinstance(method, str) and score is not None
    if not known or score is None or isinstance(threshold, bool) or not isinstance(threshold, int | float):
        return None
    against = entry.get("against")
    rows = _rows(summary, method, entry.get("only"))
    others = _rows(summary, against, entry.get("against_only") or entry.get("only")) if measure != "order" else []
    chosen = [*rows, *others]
    waiting = sum(row.status not in (DONE, FAILED) for row in chosen)
    if waiting or not rows or (measure != "order" and not others):
        missing = f"{waiting} of its {len(chosen)} cells are still to come" if waiting else "the study has no such cells"
        return Verdict(None, None, f"open: {missing}")
    lost = sum(score.path not in row.scores for row in chosen)
    said = f"{len(chosen) - lost} of {len(chosen)} cells" if lost else f"{len(chosen)} cells"
    first, second = _by_teacher(rows, score.path), _by_teacher(others, score.path)
    if measure in ("order", "order_difference"):
        own = summary.teacher_means(score.path)
        of, to = _with_teachers(first), _with_teachers(second)
        found = order(own, of).spearman if measure == "order" else correlation_difference(own, of, to)
        return Verdict(_beyond(found, threshold), found, _reason(said, found))
    with_kd, without = _by_seed(first, second)
    if measure == "gain":
        found = paired_gain(with_kd, without)
        return Verdict(_beyond(found, threshold), found, _reason(said, found), points=True)
    alike = equivalence([with_kd[seed] - without[seed] for seed in sorted(with_kd)], threshold)
    return Verdict(_within(alike), alike, _reason(said, alike), points=True)


def _rows(summary: Summary, method: Any, part: Any) -> list[Row]:
    """Cells of a method in a part of the grid; a method without a teacher is in every part of the teachers."""
    chosen = {AXIS_OF[name]: values for name, values in part.items() if name in AXIS_OF and isinstance(values, list)} if part else {}

    def within(row: Row) -> bool:
        return all(getattr(row, axis) in values or (axis == "teacher" and row.teacher is None) for axis, values in chosen.items())

    return [row for row in summary.cells if row.method == method and within(row)]


def _by_teacher(rows: Sequence[Row], path: str) -> dict[BY_CELL, float]:
    """Scores by teacher and seed, the mean where the part of the grid has several students, steps or data."""
    found: dict[BY_CELL, list[float]] = defaultdict(list)
    for row in rows:
        if path in row.scores and row.status == DONE:
            found[row.teacher, row.seed].append(row.scores[path])
    return {key: statistics.fmean(values) for key, values in found.items()}


def _with_teachers(scores: Mapping[BY_CELL, float]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for (teacher, seed), value in scores.items():
        if teacher is not None and seed is not None:
            found[teacher][seed] = value
    return dict(found)


def _by_seed(first: Mapping[BY_CELL, float], second: Mapping[BY_CELL, float]) -> tuple[dict[int, float], dict[int, float]]:
    """For each seed the means of both over the teachers that both have in it; one without a teacher stands beside each teacher.

    Where the two have no teacher in common, one teacher is held against another: the means are over those of each side.
    """
    pairs: dict[int, list[tuple[float, float]]] = defaultdict(list)
    apart = {teacher for teacher, _ in first}.isdisjoint({teacher for teacher, _ in second}) and None not in {of for of, _ in second}
    others: dict[int | None, list[float]] = defaultdict(list)
    for (_, seed), value in second.items():
        others[seed].append(value)
    for (teacher, seed), value in first.items():
        other = second.get((teacher, seed), second.get((None, seed)))
        if apart and others[seed]:
            other = statistics.fmean(others[seed])
        if seed is not None and other is not None:
            pairs[seed].append((value, other))
    means = {seed: tuple(statistics.fmean(side) for side in zip(*of, strict=True)) for seed, of in pairs.items()}
    return {seed: one for seed, (one, _) in means.items()}, {seed: other for seed, (_, other) in means.items()}


def _beyond(found: Estimate, threshold: float) -> bool | None:
    if found.low is None or found.high is None:
        return None
    return True if found.low > threshold else False if found.high <= threshold else None


def _within(found: Equivalence) -> bool | None:
    """Whether the 90 % interval lies within the margins, or outside of them."""
    if found.low is None or found.high is None:
        return None
    if -found.margin < found.low and found.high < found.margin:
        return True
    return False if found.low >= found.margin or found.high <= -found.margin else None


def _reason(said: str, found: Estimate) -> str:
    return f"{said}; {found.reason}" if found.reason else said
