"""The numbers of a report, before anything is drawn or written: means and gains by method, how students follow their teachers, the answer.

Cells that differ in student, steps or data are never averaged: those three are a Setting. In a method's mean over several teachers a seed
counts once, with the mean over its teachers, and only seeds that have every teacher. Teachers that one of a setting's methods does not have
are in none of its methods' means, so that rows are compared over the same teachers.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megakd.pages.tables import DIAGNOSTICS
from megakd.study.results import AXES, CELL, CONTROL, DONE, TEACHER, Results, Row, Score
from megakd.study.statistics import (
    FEWEST_TEACHERS,
    Estimate,
    Gain,
    Order,
    Prediction,
    correlation_difference,
    holm,
    mean_gain,
    order,
    paired_gain,
    predictors,
)

LEVEL = 0.05
ESCAPES = 0.8  # a Spearman correlation above which, and clearly above plain KD's, a method makes students follow their teachers
PLAIN_KD = ("similarity", "contrastive + similarity")  # as studies call it, and as runs without one are named


class Setting(NamedTuple):
    """What stays the same where methods and teachers are compared."""

    student: str | None
    steps: str | None
    data: str | None


@dataclass(frozen=True)
class Group:
    """Cells of one method, and one teacher or all. by_seed: for each path the mean over the teachers, for each seed.

    complete: of the seeds in by_seed, every one has all the teachers of the group; else it is of what is there, and not tested.
    """

    method: str
    teacher: str | None
    setting: Setting
    cells: int
    done: int
    by_seed: Mapping[str, Mapping[int, float]]
    complete: bool

    def mean(self, path: str) -> float | None:
        values = self.by_seed.get(path)
        return statistics.fmean(values.values()) if values else None

    def deviation(self, path: str) -> float | None:
        """Of the sample of seeds; None for one."""
        values = self.by_seed.get(path, {})
        return statistics.stdev(values.values()) if len(values) > 1 else None


@dataclass(frozen=True)
class Compared:
    """A group, with its gains over the method without a teacher by path, and their p values adjusted over the whole table."""

    group: Group
    gains: Mapping[str, Gain]
    adjusted: Mapping[str, float]

    def differs(self, path: str) -> bool:
        return self.adjusted.get(path, 1.0) < LEVEL


@dataclass(frozen=True)
class Followed:
    """How students of one method follow their teachers in one score. over_plain: Spearman's less that under `Summary.plain_kd`."""

    method: str
    setting: Setting
    score: Score
    order: Order
    over_plain: Estimate | None


class Summary:
    """Everything a report computes of `results`, each once. tested: gains have intervals and p values, which takes scipy."""

    def __init__(self, results: Results, *, tested: bool = True) -> None:
        self.results, self.tested = results, tested
        self.cells = results.of(CELL)
        rank = {axis: {value: place for place, value in enumerate(results.axes.get(axis, ()))} for axis in AXES}

        def places(row: Row, axes: Iterable[str]) -> tuple[int, ...]:
            return tuple(rank[axis].get(str(getattr(row, axis)), -1) for axis in axes)

        ordered = sorted((row for row in self.cells if row.method is not None), key=lambda row: places(row, ("student", "steps", "data")))
        self.settings = list(dict.fromkeys(setting_of(row) for row in ordered))
        self.methods = [method for method in results.axes["method"] if any(row.method == method for row in self.cells)]
        self.methods.sort(key=lambda method: method != results.plain)  # the one without a teacher is the first row
        self.teachers = [name for name in results.axes["teacher"] if any(row.teacher == name for row in self.cells)]

    @cached_property
    def plain_kd(self) -> str | None:
        """The method that others are measured by: similarity-matrix KD by its usual names, else the first with the most teachers."""
        teachers = {method: len({row.teacher for row in self.cells if row.method == method} - {None}) for method in self.methods}
        usual = next((method for method in PLAIN_KD if teachers.get(method)), None)
        return usual or next((method for method, number in teachers.items() if number and number == max(teachers.values())), None)

    def place(self, method: str) -> int | None:
        """Of a method among the series of all figures; None for the one without a teacher, which looks like no other.

        Those that have a curve over teachers are first, and apart by their colours.
        """
        followed = dict.fromkeys(found.method for found in self.followed)
        series = [one for one in dict.fromkeys((*followed, *self.methods)) if one != self.results.plain]
        return series.index(method) if method in series else None

    @cached_property
    def main_setting(self) -> Setting | None:
        """The one with the most finished cells; the first of those."""
        done = [sum(row.status == DONE for row in self.cells if setting_of(row) == setting) for setting in self.settings]
        return self.settings[done.index(max(done))] if done else None

    @cached_property
    def by_method(self) -> list[Compared]:
        return self._compared(by_teacher=False)

    @cached_property
    def by_teacher(self) -> list[Compared]:
        return self._compared(by_teacher=True)

    @cached_property
    def followed(self) -> list[Followed]:
        """For each setting, method and score; only where two teachers that have the score themselves have students."""
        found = []
        for setting in self.settings:
            for score in self.results.scores:
                own = self.teacher_means(score.path)
                for method in self.methods:
                    students = self._compared_students(setting, method, score.path)
                    if len(own.keys() & students.keys()) > 1:
                        plain = self._compared_students(setting, self.plain_kd, score.path) if method != self.plain_kd else {}
                        over = correlation_difference(own, students, plain) if plain else None
                        found.append(Followed(method, setting, score, order(own, students), over))
        return found

    @cached_property
    def predictions(self) -> list[Prediction]:
        """Diagnostics by how well they predict the main score of the main setting's cells."""
        main = self.results.main
        rows = [row for row in self.cells if main and setting_of(row) == self.main_setting and main.path in row.scores and row.teacher]
        names = {row.id: {path: value for path, value in row.scores.items() if path.startswith(DIAGNOSTICS)} for row in rows}
        found = {name: of for name, of in names.items() if of}
        assert main is not None or not found
        scores = {row.id: row.scores[main.path] for row in rows} if main else {}
        return predictors(found, scores, {row.id: row.teacher for row in rows if row.teacher}) if found else []

    def teacher_means(self, path: str) -> dict[str, float]:
        own = {name: self.results.teacher_scores(name, path) for name in self.teachers}
        return {name: statistics.fmean(scores) for name, scores in own.items() if scores}

    def students(self, setting: Setting, method: str | None, path: str) -> dict[str, dict[int, float]]:
        """{teacher: {seed: score}} of finished cells."""
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for place, row in enumerate(self.cells):
            if row.status == DONE and row.method == method and row.teacher and setting_of(row) == setting and path in row.scores:
                found[row.teacher][row.seed if row.seed is not None else -1 - place] = row.scores[path]
        return dict(found)

    @cached_property
    def compared_teachers(self) -> dict[Setting, set[str]]:
        """For each setting those that every method with a teacher has; all of them where there is none."""
        found = {}
        for setting in self.settings:
            rows = [row for row in self.cells if setting_of(row) == setting and row.teacher]
            of_methods = [{row.teacher for row in rows if row.method == method and row.teacher} for method in {row.method for row in rows}]
            found[setting] = (set.intersection(*of_methods) or set.union(*of_methods)) if of_methods else set()
        return found

    def is_compared(self, row: Row) -> bool:
        """Whether a cell counts in the mean of its method."""
        return row.teacher is None or row.teacher in self.compared_teachers.get(setting_of(row), ())

    def escaping(self) -> list[Followed]:
        """Methods of the main setting under which stronger teachers do make better students in the main score: ESCAPES, and clearly more
        than under plain KD.
        """
        found = [of for of in self.followed if of.setting == self.main_setting and of.score == self.results.main and of.over_plain]
        return [
            of for of in found
            if (of.order.spearman.value or 0.0) > ESCAPES and of.over_plain and of.over_plain.low is not None and of.over_plain.low > 0
        ]  # fmt: skip

    def _compared_students(self, setting: Setting, method: str | None, path: str) -> dict[str, dict[int, float]]:
        """Of the teachers that all methods have, where those are enough for an order; else of the method's own."""
        found, shared = self.students(setting, method, path), self.compared_teachers[setting]
        return {name: of for name, of in found.items() if name in shared} if len(shared) >= FEWEST_TEACHERS else found

    def references(self) -> dict[str, list[Row]]:
        """Rows of each teacher, with the readouts of its tower, and of each control, in the order of the study; those that are done or have
        scores."""
        found: dict[str, list[Row]] = {}
        for row in (*self.results.of(TEACHER), *self.results.of(CONTROL)):
            if row.scores or row.status == DONE:
                name = f"teacher {row.teacher}" if row.teacher else row.id.removesuffix(f", seed {row.seed}")
                found.setdefault(name, []).append(row)
        return found

    def _compared(self, *, by_teacher: bool) -> list[Compared]:
        groups = []
        for setting in self.settings:
            for method in self.methods:
                rows = [row for row in self.cells if row.method == method and setting_of(row) == setting]
                if not by_teacher:
                    rows = [row for row in rows if self.is_compared(row)]
                teachers: list[str | None] = [None, *self.teachers] if by_teacher else [None]
                for teacher in teachers:
                    chosen = [row for row in rows if row.teacher == teacher] if by_teacher else rows
                    if chosen:
                        groups.append(_group(method, teacher, setting, chosen, [score.path for score in self.results.scores]))
        plain = {group.setting: group for group in groups if group.method == self.results.plain}
        gain_of = paired_gain if self.tested else mean_gain
        gains: list[dict[str, Gain]] = []
        for group in groups:
            base = plain.get(group.setting)
            compared = base is not None and group is not base and group.complete and base.complete
            gains.append(
                {path: gain_of(group.by_seed[path], base.by_seed[path]) for path in group.by_seed if path in base.by_seed}
                if compared and base
                else {}
            )
        keys = [(place, path) for place, of in enumerate(gains) for path in of]
        adjusted: list[dict[str, float]] = [{} for _ in groups]
        for (place, path), p in zip(keys, holm([gains[place][path].p for place, path in keys]), strict=True):
            if p is not None:
                adjusted[place][path] = p
        return [Compared(*of) for of in zip(groups, gains, adjusted, strict=True)]


def setting_of(row: Row) -> Setting:
    return Setting(row.student, row.steps, row.data)


def _group(method: str, teacher: str | None, setting: Setting, rows: Sequence[Row], paths: Iterable[str]) -> Group:
    teachers = {row.teacher for row in rows}
    done = [row for row in rows if row.status == DONE]
    complete, by_seed = True, {}
    for path in paths:
        values: dict[int, dict[str | None, float]] = defaultdict(dict)
        for place, row in enumerate(done):
            if path in row.scores:  # a row without a seed is one of its own
                values[row.seed if row.seed is not None else -1 - place][row.teacher] = row.scores[path]
        whole = {seed: of for seed, of in values.items() if len(of) == len(teachers)}
        if values and not whole:
            complete = False
        if values:
            by_seed[path] = {seed: statistics.fmean(of.values()) for seed, of in sorted((whole or values).items())}
    return Group(method, teacher, setting, len(rows), len(done), by_seed, complete)


def labels(setting: Setting, settings: Sequence[Setting]) -> dict[str, str]:
    """The parts of a setting that the study varies, by axis."""
    return {axis: str(value) for axis, value in setting._asdict().items() if len({getattr(other, axis) for other in settings}) > 1}
