"""Rows of run folders that no study has planned: what their recipes say takes the place of a study's axes.

A run without a teacher is "no KD"; another's method is the list of its objectives, with each setting that runs of equal objectives differ
in. A run whose model another one distils is a teacher; a run that answers questions through another one's tower is that one's readout,
and gives it its scores.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megakd.pages.names import data_name, model_name
from megakd.pages.scores import known_scores
from megakd.pages.texts import clean, cleaned, json_object
from megakd.recipe.objectives import Objectives, declaration
from megakd.runtime.locks import held
from megakd.runtime.run_folder import BUNDLE, EVALUATION, METRICS, MODEL, RUN, read_metrics
from megakd.study.results import (
    CELL,
    CONTROL,
    DONE,
    FAILED,
    MISSING,
    RUNNING,
    STUDY,
    TEACHER,
    Results,
    Row,
    Score,
    axes_of,
    evaluated,
    read_study,
)

NO_KD = "no KD"
# Sections of a recipe that say where things lie, how a run is carried out or which axis it is on: they make no other method.
APART = frozenset(
    ("name", "seed", "data", "student", "decoder", "answers", "evaluation", "checkpoint", "export", "log", "watchdog", "kernels")
)
OF_A_TEACHER = frozenset(
    ("model", "architecture", "pretrained", "tokenizer", "preprocess", "recipe", "store", "store_of", "store_miss", "mode", "offload")
)
APART_KEYS = frozenset(("optim.steps", "views.seed", "teacher.ds_config", *(f"teacher.{key}" for key in OF_A_TEACHER)))


@dataclass
class _Run:
    """A run folder. recipe: as run.json has it, unchecked; problem: why it has none. name: its own, or its path where another has that."""

    folder: Path
    recipe: Mapping[str, Any]
    problem: str
    name: str = ""
    readouts: list[_Run] = field(default_factory=list)

    def section(self, name: str) -> Mapping[str, Any]:
        value = self.recipe.get(name)
        return value if isinstance(value, Mapping) else {}

    def objectives(self) -> dict[str, float]:
        return {name: weight for name, weight in self.section("objectives").items() if _is_number(weight) and weight != 0}

    def teachers(self) -> list[Mapping[str, Any]]:
        """Sections of the teachers that an objective asks for; empty without KD."""
        if not any(declaration(name).needs_teacher if name in Objectives.model_fields else True for name in self.objectives()):
            return []
        ensemble = [one for one in self.section("ensemble").values() if isinstance(one, Mapping)]
        return ([self.section("teacher")] if self.section("teacher") else []) + ensemble


def read(paths: Sequence[Path]) -> Results:
    """A study's rows, where `paths` is one study's folder, else those of run folders, or of the run folders in one folder.

    Raises ValueError for a path that is not there, and where no run is found.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: is not there; give a study's folder or run folders")
    folders = [path for path in paths if path.is_dir()]
    if len(folders) == 1 == len(paths):
        if (folders[0] / STUDY).exists():
            return read_study(folders[0])
        if not _is_run(folders[0]):
            folders = sorted(path for path in folders[0].iterdir() if path.is_dir() and _is_run(path))
    if not any(map(_is_run, folders)):
        raise ValueError(
            f"{', '.join(map(str, paths[:3]))}: neither a study ({STUDY}) nor a run folder ({RUN} or {EVALUATION}), nor a folder "
            "with run folders in it; give one of these, or run folders: runs/*/*"
        )
    runs = [_read_run(folder) for folder in dict.fromkeys(folders)]
    files = len(paths) - len([path for path in paths if path.is_dir()])
    notes = [f"{files} paths are files, and were passed over"] if files else []
    return _results(runs, notes)


def _is_run(folder: Path) -> bool:
    return (folder / RUN).exists() or (folder / EVALUATION).exists()


def _read_run(folder: Path) -> _Run:
    if (folder / STUDY).exists():
        return _Run(folder, {}, f"a study's folder, no run's: `megakd report {folder}` reads it alone")
    if not _is_run(folder):
        return _Run(folder, {}, f"no run folder: it has neither {RUN} nor {EVALUATION}")
    if not (folder / RUN).exists():  # scores of a model that was not trained here
        return _Run(folder, {}, "")
    content = json_object(folder / RUN)
    if isinstance(content, str):
        return _Run(folder, {}, content)
    recipe = content.get("recipe")
    return _Run(folder, cleaned(recipe), "") if isinstance(recipe, Mapping) else _Run(folder, {}, f"{folder / RUN}: holds no recipe")


def _results(runs: list[_Run], notes: list[str]) -> Results:
    by_name: dict[str, list[_Run]] = defaultdict(list)
    for run in runs:
        by_name[run.folder.absolute().name].append(run)
    common = Path(*_common_parts([run.folder.absolute() for run in runs]))
    for run in runs:
        own = run.folder.absolute()
        run.name = clean(own.name if len(by_name[own.name]) == 1 else str(own.relative_to(common)))
    readouts = []
    for run in runs:
        tower = _run_of(run.section("student").get("model"), by_name) if run.recipe.get("answers") else None
        if tower is not None and tower is not run and (run.folder / EVALUATION).exists():
            tower.readouts.append(run)
            readouts.append(run)
    taught_by = {id(run): [_run_of(section.get("model"), by_name) for section in run.teachers()] for run in runs}
    teachers = {id(found) for of in taught_by.values() for found in of if found is not None}
    methods = _methods(runs)
    rows: list[Row] = []
    for run in runs:
        if any(run is readout for readout in readouts):
            continue
        if id(run) in teachers:
            rows += [replace(row, kind=TEACHER, teacher=run.name, student=None, method=None) for row in _rows(run, None, None)]
            if not run.teachers():
                continue
        names = [found.name if found else model_name(section) for found, section in zip(taught_by[id(run)], run.teachers(), strict=True)]
        rows += _rows(run, clean(" + ".join(names)) or None, methods.get(id(run)))
    cells = [row for row in rows if row.kind == CELL]
    plain = Counter(row.method for row in cells if row.teacher is None and row.method and row.method.startswith(NO_KD))
    return Results(
        title=f"{len(runs)} runs" if len(runs) > 1 else runs[0].name,
        question="",
        command="",
        commit=None,
        version=None,
        data={},
        axes=axes_of(cells, {}),
        scores=_scores(rows),
        plain=max(plain, key=lambda method: plain[method]) if plain else None,
        rows=tuple(rows),
        hypotheses=(),
        base=common,
        notes=tuple(notes),
    )


def _rows(run: _Run, teacher: str | None, method: str | None) -> list[Row]:
    """One row, or one for each readout of the run's tower, with the scores of both."""
    ended = any((run.folder / name).exists() for name in (MODEL, BUNDLE))
    status, message = DONE, run.problem
    scores, about, damage = evaluated([run.folder] if (run.folder / EVALUATION).exists() else [], ended=ended or not run.recipe)
    if run.problem or damage:
        status, message = FAILED, run.problem or damage
    elif not ended and not scores:
        status, message = _unfinished(run)
    elif not scores and not run.readouts:
        message = "it has no scores: its recipe names no evaluation sets, or its evaluation.json was removed"
    of_questions = bool(run.recipe.get("answers"))
    seed, steps = run.recipe.get("seed"), run.section("optim").get("steps")
    row = Row(
        id=run.name,
        kind=CELL if run.recipe and (scores or run.readouts or not of_questions) else CONTROL,
        teacher=teacher,
        student=model_name(run.section("student")) if run.recipe else None,
        method="VQA readout" if of_questions else method,
        steps=str(steps) if steps is not None else None,
        data=data_name(run.section("data").get("train")),
        seed=seed if type(seed) is int else None,
        status=status,
        message=message,
        scores=scores,
        folder=run.folder,
        about=about,
    )
    if len(run.readouts) < 2:
        return [_with_readout(row, readout, row.id) for readout in run.readouts] or [row]
    return [_with_readout(row, readout, f"{row.id}, {readout.name}") for readout in run.readouts]


def _with_readout(row: Row, readout: _Run, name: str) -> Row:
    scores, _, problem = evaluated([readout.folder], ended=True)
    status, message = (FAILED, problem) if problem and row.status == DONE else (row.status, row.message)
    return replace(row, id=name, scores={**scores, **row.scores}, readout=readout.folder, status=status, message=message)


def _unfinished(run: _Run) -> tuple[str, str]:
    """(status, message) of a run without results."""
    if held(run.folder):
        return RUNNING, ""
    try:
        rows = read_metrics(run.folder) if (run.folder / METRICS).exists() else []
    except OSError as error:
        return FAILED, f"{run.folder / METRICS}: {error}"
    last = rows[-1]["step"] if rows else 0
    return MISSING, f"it stopped at step {last} of {run.section('optim').get('steps', '?')}"


def _methods(runs: Sequence[_Run]) -> dict[int, str]:
    """Names of methods by run: no two runs of one name differ in more than paths, seeds and axes."""
    alike: dict[str, list[_Run]] = defaultdict(list)
    for run in runs:
        if run.recipe and not run.recipe.get("answers"):
            alike[_objectives_name(run)].append(run)
    names = {}
    for name, of in alike.items():
        settings = {id(run): dict(_settings(run)) for run in of}
        usual = {
            key: Counter(found[key] for found in settings.values() if key in found).most_common(1)[0][0]
            for key in dict.fromkeys(key for found in settings.values() for key in found)
        }
        for run in of:
            odd = [f"{key} = {value}" for key, value in settings[id(run)].items() if value != usual[key]]
            names[id(run)] = clean(", ".join([name, *odd]))
    return names


def _objectives_name(run: _Run) -> str:
    named = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in run.objectives().items())
    if run.teachers():
        return named
    return NO_KD if named in ("contrastive", "") else f"{NO_KD}: {named}"


def _settings(run: _Run) -> Iterator[tuple[str, str]]:
    """Every setting that may make another method of a run, by its key; those of idle objectives and of no teacher may not."""
    idle = {name for name in Objectives.model_fields if name not in run.objectives()} | {"objectives"} | APART
    idle |= set() if run.teachers() else {"teacher", "ensemble"}
    waiting = [(name, value) for name, value in list(run.recipe.items())[::-1] if name not in idle]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{key}.{name}", inner) for name, inner in list(value.items())[::-1]]
        elif key not in APART_KEYS:
            yield key, json.dumps(value)


def _run_of(model: Any, by_name: Mapping[str, Sequence[_Run]]) -> _Run | None:
    """The run whose model/ this is, by as many parts of the path as are needed to tell it from others."""
    found = re.fullmatch(rf"local-dir:(.+)/{MODEL}/?", model) if isinstance(model, str) else None
    if found is None:
        return None
    parts = Path(found[1]).parts
    candidates = by_name.get(parts[-1], ())

    def shared(run: _Run) -> int:
        pairs = enumerate(zip(reversed(run.folder.absolute().parts), reversed(parts), strict=False))
        return next((count for count, (one, other) in pairs if one != other), len(parts))

    return max(candidates, key=shared, default=None)


def _scores(rows: Sequence[Row]) -> tuple[Score, ...]:
    found = known_scores(path for row in rows for path in row.scores)
    return tuple(Score(of.path, of.path, of.title, main=not place, families=of.families) for place, of in enumerate(found))


def _common_parts(folders: Sequence[Path]) -> tuple[str, ...]:
    """Of their parents' paths, the parts in front that all share."""
    parents = [folder.parent.parts for folder in folders]
    count = next((place for place, parts in enumerate(zip(*parents, strict=False)) if len(set(parts)) > 1), min(map(len, parents)))
    return parents[0][:count]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
