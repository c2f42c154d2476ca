"""The cells of a study: an ordinary recipe for each combination of its axes, known by its content."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.recipe import Objectives, Recipe, load, resume, texts
from megakd.recipe.objectives import declaration
from megakd.runtime.files import json_sha256
from megakd.runtime.run_folder import MODEL
from megakd.study import launcher
from megakd.study.results import AXES
from megakd.study.spec import DEFAULT, Part, StudySpec, as_overrides, chosen

ID = 10  # hexadecimal digits of a content's checksum: of 10,000 cells two are alike once in 20,000 studies, and that would be said
STORE_SEED = 0  # of the augmentation that all students of a store see
# What a recipe names by place, which says nothing of what is learned: the id of what lies there is a part of a cell's own.
_PLACES = ("teacher.model", "teacher.recipe", "teacher.store", "teacher.store_miss", "views.seed")


@dataclass(frozen=True)
class Cell:
    """One student. axes: the names of its values; no teacher where its method needs none. id: of what it learns, and from what."""

    axes: Mapping[str, Any]
    recipe: Recipe
    id: str

    @property
    def teacher(self) -> str | None:
        return self.axes["teacher"]  # type: ignore[no-any-return]

    @property
    def folder(self) -> str:
        return f"cells/{slug(self._names())}-{self.id}"

    def __str__(self) -> str:
        return " / ".join(self._names())

    def _names(self) -> list[str]:
        """Without those of axes that the file does not vary."""
        varied = (self.axes[axis] for axis in AXES if self.axes[axis] not in (None, DEFAULT))
        return [f"seed {name}" if isinstance(name, int) else name for name in varied]


@dataclass(frozen=True)
class Teacher:
    """recipe: that trains it first; None for a model as it is. settings: keys of the students' [teacher]. folder: of its own run.

    taught_by: the teacher that its recipe distils.
    """

    name: str
    recipe: Recipe | None
    settings: Mapping[str, Any]
    id: str
    taught_by: Teacher | None = None

    @property
    def folder(self) -> str:
        return f"teachers/{slug([self.name])}-{self.id}"


@dataclass(frozen=True)
class Grid:
    teachers: dict[str, Teacher]
    cells: list[Cell]


def slug(names: Iterable[Any]) -> str:
    """Names as a part of a folder's."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", "_".join(map(str, names))).strip("_")[:80]


def expand(spec: StudySpec, out: Path, *, small: bool = False) -> Grid:
    """The study's teachers and cells, seeds outermost, so that a study which is cut short has whole seeds.

    out: its folder, by which cells name the teachers that are trained there. small: the part that the file calls so.
    Raises ValueError, with the place in the study's file, for overrides that no recipe takes, for two names of one content, and for a
    grid without cells.
    """
    if small and spec.small is None:
        raise ValueError("--small: this study has no [small] part; add one, or run it whole")
    kept = spec.small if small and spec.small is not None else Part()
    teachers: dict[str, Teacher] = {}
    for name in spec.teachers:
        teachers[name] = _teacher(spec, name, teachers, out)
    cells: dict[str, Cell] = {}
    for axes in _combinations(spec, kept):
        cell = _cell(spec, axes, teachers, out)
        if (other := cells.get(cell.id)) is not None:
            differing = next(axis for axis in AXES if axes[axis] != other.axes[axis])
            raise ValueError(
                f"{differing}: {other.axes[differing]!r} and {axes[differing]!r} are two names of one content (in the cells {other} and "
                f"{cell}); take one of them out, or set what is to differ"
            )
        cells[cell.id] = cell
    if not cells:
        raise ValueError("exclude: nothing of the grid is left; take a line of it out")
    used = {cell.teacher for cell in cells.values()}
    return Grid({name: teacher for name, teacher in teachers.items() if name in used}, list(cells.values()))


def _combinations(spec: StudySpec, kept: Part) -> Iterator[dict[str, Any]]:
    seen = set()
    for seed in spec.seeds:
        for values in itertools.product(*(spec.axis(axis) or [None] for axis in AXES[:-1])):
            axes = dict(zip(AXES, (*values, seed), strict=True))
            if (
                not within(axes, kept)
                or not any(within(axes, part) for part in spec.grid)
                or any(within(axes, part) for part in spec.exclude)
            ):
                continue
            if not spec.methods[axes["method"]].teacher:
                axes["teacher"] = None
            if (key := tuple(axes.values())) not in seen:
                seen.add(key)
                yield axes


def within(axes: Mapping[str, Any], part: Part) -> bool:
    """Whether a cell is in a part of the grid; one without a teacher is in the part of any."""
    return all(axes[axis] in values or (axis == "teacher" and axes[axis] is None) for axis, values in chosen(part).items())


def _teacher(spec: StudySpec, name: str, earlier: Mapping[str, Teacher], out: Path) -> Teacher:
    given = spec.teachers[name]
    if given.recipe is None:
        return Teacher(name, None, given.teacher, json_sha256(given.teacher)[:ID])
    overrides = [*moved(spec, given.recipe), *as_overrides(spec.scoring(taught=False))]
    by = None if given.taught_by is None else earlier[given.taught_by]
    if by is not None:
        overrides += _taught(by, out)
    recipe = _loaded(f"teachers.{name}", given.recipe, [*overrides, *as_overrides(given.set)])
    if by is not None and not recipe.in_need_of_a_teacher():
        raise ValueError(
            f"teachers.{name}.taught_by = {by.name!r}: no objective of recipe {given.recipe} reads a teacher; give one a weight"
        )
    return Teacher(name, recipe, given.teacher, _id(recipe, *([] if by is None else [by.id])), by)


def _taught(by: Teacher, out: Path) -> list[str]:
    """Overrides that make it the recipe's teacher; keys of the recipe's own do not stay beside another's."""
    settings = {**by.settings} if by.recipe is None else {"model": f"local-dir:{out / by.folder}/{MODEL}", **by.settings}
    return ["teacher={}", *as_overrides({"teacher": settings})]


def _cell(spec: StudySpec, axes: Mapping[str, Any], teachers: Mapping[str, Teacher], out: Path) -> Cell:
    parts = {
        "set": spec.set,
        f"data.{axes['data']}": spec.data[axes["data"]].set,
        f"students.{axes['student']}": spec.students[axes["student"]].set,
        f"steps.{axes['steps']}": spec.steps[axes["steps"]].set,
    }
    teacher = None if axes["teacher"] is None else teachers[axes["teacher"]]
    parts[f"methods.{axes['method']}"] = spec.methods[axes["method"]].set
    alone = [f"objectives.{name}=0.0" for name in _distilling()]
    overrides = [*moved(spec, spec.base), *as_overrides(spec.scoring(taught=teacher is not None)), *alone]
    overrides += [] if teacher is None else _taught(teacher, out)
    overrides += [override for settings in parts.values() for override in as_overrides(settings)]
    recipe = _loaded(", ".join(name for name, settings in parts.items() if settings), spec.base, [*overrides, f"seed={axes['seed']}"])
    method, needy = spec.methods[axes["method"]], recipe.in_need_of_a_teacher()
    if method.teacher and not needy:
        raise ValueError(f"methods.{axes['method']}: no objective of it reads a teacher; give one a weight, or set teacher = false")
    if not method.teacher and needy:
        raise ValueError(f"methods.{axes['method']}: teacher = false, and objectives.{needy[0]} needs one; take one of the two out")
    return Cell(axes, recipe, _id(recipe, *([] if teacher is None else [teacher.id])))


def moved(spec: StudySpec, recipe: str) -> list[str]:
    """Overrides by which a recipe reads the study's own world."""
    return [] if spec.world is None else launcher.moved(recipe, Path(spec.world.folder))


def _loaded(places: str, source: str, overrides: list[str]) -> Recipe:
    try:
        return load.load(source, overrides)[0]
    except ValueError as error:
        lines = str(error).splitlines()
        # The overrides of all places are in the first line, and would hide what is wrong with one of them.
        raise ValueError(
            "\n".join([f"{places or 'base'}: with these settings the recipe {source} is wrong:", *lines[1:]] if lines[1:] else lines)
        ) from None


def _distilling() -> list[str]:
    """Objectives that read a teacher."""
    return [name for name in Objectives.model_fields if declaration(name).needs_teacher]


def _id(recipe: Recipe, *more: str) -> str:
    """Of all settings that change what is learned, and of what `more` stands for; where models and results lie is no part of it."""
    settings = texts.flat(recipe.model_dump(mode="json"))
    learned = {key: value for key, value in settings.items() if resume.change(key) != "free" and not (more and key in _PLACES)}
    return json_sha256([learned, *more])[:ID]
