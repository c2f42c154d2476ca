"""What a study has found so far, as rows: a cell, a teacher or a control each, with its scores or with what became of it.

STUDY_DIR/study.json says which rows there are (`megakd study` writes it), each run folder's evaluation.json what it scored. Nothing of this
ends in an exception but a study.json that cannot be read: a damaged or missing evaluation is a row with a status and a message.
`found_runs.py` makes the same of run folders that no study has planned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megakd.evaluation import report
from megakd.pages.texts import clean, cleaned, json_object
from megakd.runtime.run_folder import EVALUATION, RUN

STUDY = "study.json"
FORMAT = 1
AXES = ("teacher", "student", "method", "steps", "data", "seed")
DONE, FAILED, MISSING, RUNNING = "done", "failed", "missing", "running"
CELL, TEACHER, CONTROL = "cell", "teacher", "control"
LONGEST_MESSAGE = 1000  # characters; of a longer one the end, where the error is


@dataclass(frozen=True)
class Row:
    """One cell, teacher or control.

    scores: fractions by path, "retrieval/test/mean_R@1"; empty where a run has not ended. about: "parameters" and "images_per_second" (of
    inference) where its evaluation has them, "sets", the checksum of what it was scored on. folder: of the student's run; readout: of the
    decoder that read its tower, which of a tower that no run of this row has trained is the folder as well.
    """

    id: str
    kind: str
    teacher: str | None
    student: str | None
    method: str | None
    steps: str | None
    data: str | None
    seed: int | None
    status: str
    message: str
    scores: Mapping[str, float]
    folder: Path
    readout: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A column of the tables. families: a pattern of paths with one `*`, "reader/test/by_family/*/accuracy"."""

    name: str
    path: str
    title: str
    main: bool = False
    families: str | None = None


@dataclass(frozen=True)
class Results:
    """A study's rows, and what they are compared by.

    axes: values of `AXES` in the order of the study's file. plain: the method without a teacher. base: the folder that paths are shown
    from. notes: what a reader of the tables has to know of how they were made. of_gain: the question is whether students gain over the
    method without a teacher, not how they follow their teachers.
    """

    title: str
    question: str
    command: str
    commit: str | None
    version: str | None
    data: Mapping[str, str]
    axes: Mapping[str, tuple[str, ...]]
    scores: tuple[Score, ...]
    plain: str | None
    rows: tuple[Row, ...]
    hypotheses: tuple[Mapping[str, Any], ...]
    base: Path
    notes: tuple[str, ...] = ()
    of_gain: bool = False

    @property
    def main(self) -> Score | None:
        """The score that the question is about: the first that says so, else the first."""
        return next((score for score in self.scores if score.main), self.scores[0] if self.scores else None)

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]

    def teacher_scores(self, teacher: str, path: str) -> list[float]:
        """The teacher's own, of its run or, where that was not scored so, of the readouts of its tower (one a seed)."""
        for kind in (TEACHER, CONTROL):
            own = [row.scores[path] for row in self.of(kind) if row.teacher == teacher and path in row.scores]
            if own:
                return own
        return []


def read_study(folder: Path) -> Results:
    """The rows of FOLDER/study.json. Raises ValueError where that cannot be read, or is of a newer megakd."""
    path = folder / STUDY
    content = json_object(path)
    if isinstance(content, str):
        raise ValueError(f"{content}; `megakd study` writes it anew, and `megakd report RUN...` takes run folders without it")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {content.get('format')!r}, where this megakd reads {FORMAT}: report with the version that wrote it"
        )
    teachers = [_teacher(folder, entry) for entry in _objects(content.get("teachers"))]
    rows = [_cell(folder, entry) for entry in _objects(content.get("cells"))]
    declared = content.get("axes")
    axes = axes_of(rows, declared if isinstance(declared, Mapping) else {})
    names = {*axes["teacher"], *(row.teacher for row in teachers if row.teacher)}
    controls = [_control(folder, entry, names) for entry in _objects(content.get("controls"))]
    return Results(
        title=_text(content.get("title")) or folder.absolute().name,
        question=_text(content.get("question")) or "",
        command=_text(content.get("command")) or "",
        commit=_text(content.get("commit")),
        version=_text(content.get("version")),
        data=_checksums(content.get("data")),
        axes=axes,
        scores=_scores(content.get("scores")),
        plain=_text(content.get("plain_method")),
        rows=(*rows, *teachers, *controls),
        hypotheses=tuple(cleaned(entry) for entry in _objects(content.get("hypotheses"))),
        base=folder,
        of_gain=content.get("asks") == "gain",
    )


def axes_of(cells: Sequence[Row], declared: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Values of each axis: as declared, then what cells have beside them, in their order."""
    found: dict[str, tuple[str, ...]] = {}
    for axis in AXES:
        values = declared.get(axis)
        listed = [_text(value) for value in values] if isinstance(values, list) else []
        listed += [_text(getattr(cell, axis)) for cell in cells]
        found[axis] = tuple(dict.fromkeys(value for value in listed if value))
    return found


def evaluated(folders: Iterable[Path], *, ended: bool) -> tuple[dict[str, float], dict[str, Any], str]:
    """(scores, what else is known, the first problem or "") of the evaluation.json of each folder, those after the first adding theirs.

    ended: the runs have reached their ends. Of one that has not, scores are those of a student in training, and are left out, unless its
    evaluation is of the recipe's last step.
    """
    scores: dict[str, float] = {}
    about: dict[str, Any] = {}
    problem = ""
    for folder in folders:
        content = json_object(folder / EVALUATION)
        if isinstance(content, str):
            problem = problem or content
            continue
        if not ended and not _of_last_step(folder, content):
            continue
        try:
            found = report.numbers(content)
        except (RecursionError, TypeError, AttributeError) as error:
            problem = problem or f"{folder / EVALUATION}: {error}"
            continue
        known = {path: value for path, value in found.items() if math.isfinite(value) and not path.endswith("/unreadable")}
        scores |= {clean(path): value for path, value in known.items() if clean(path) not in scores}
        for key in ("parameters", "images_per_second"):
            value = content.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                about.setdefault(key, value)
        if isinstance(content.get("sets"), str):
            about.setdefault("sets", clean(content["sets"]))
    return scores, about, problem


def shortened(text: str) -> str:
    """The end of a message that is too long for a table."""
    return text if len(text) <= LONGEST_MESSAGE else f"…{text[-LONGEST_MESSAGE:]}"


def _cell(base: Path, entry: Mapping[str, Any]) -> Row:
    axes = entry.get("axes")
    axes = axes if isinstance(axes, Mapping) else {}
    seed = axes.get("seed")
    found = _row(base, entry, CELL, _text(entry.get("id")) or _text(entry.get("folder")) or "?", seed if type(seed) is int else None)
    teacher, student, method, steps, data = (_text(axes.get(axis)) for axis in AXES if axis != "seed")
    return replace(found, teacher=teacher, student=student, method=method, steps=steps, data=data)


def _teacher(base: Path, entry: Mapping[str, Any]) -> Row:
    """Its parameters stand in for those of an evaluation that is not there."""
    name = _text(entry.get("name")) or "?"
    found = _row(base, entry, TEACHER, f"teacher {name}", None)
    parameters = entry.get("parameters")
    about = {"parameters": parameters, **found.about} if type(parameters) is int else found.about
    return replace(found, teacher=name, about=about)


def _control(base: Path, entry: Mapping[str, Any], teachers: Iterable[str]) -> Row:
    """One that is named "teacher NAME's tower" is that teacher's; a seed may be a key, or the end of the name."""
    name, seed = _text(entry.get("name")) or "?", entry.get("seed")
    if at_end := re.fullmatch(r"(.+), seed (\d{1,18})", name, re.DOTALL):
        name, seed = at_end[1], int(at_end[2]) if seed is None else seed
    seed = seed if type(seed) is int else None
    found = _row(base, entry, CONTROL, name if seed is None else f"{name}, seed {seed}", seed)
    return replace(found, teacher=next((teacher for teacher in teachers if name == f"teacher {teacher}'s tower"), None))


def _row(base: Path, entry: Mapping[str, Any], kind: str, name: str, seed: int | None) -> Row:
    """With the scores of its folders: of the student, or whatever run it is, and of the readout. A run that is not scored is in "folder"
    alone."""
    own, parts = entry.get("folder"), entry.get("folders")
    parts = parts if isinstance(parts, Mapping) else {"student": own}
    student, readout = (base / part if isinstance(part := parts.get(role), str) else None for role in ("student", "readout"))
    status, message = entry.get("status"), _text(entry.get("message")) or ""
    status = status if status in (DONE, FAILED, MISSING, RUNNING) else MISSING
    folders = [folder for folder in (student, readout) if folder is not None]
    scores, about, problem = evaluated(folders, ended=status == DONE)
    main = base / own if isinstance(own, str) else student or readout
    if status == DONE and (problem or main is None):
        status, message = FAILED, problem or f"{STUDY} names no folder of its run"
    return Row(
        id=name,
        kind=kind,
        teacher=None,
        student=None,
        method=None,
        steps=None,
        data=None,
        seed=seed,
        status=status,
        message=shortened(message),
        scores=scores,
        folder=main or base,
        readout=readout,
        about=about,
    )


def _of_last_step(folder: Path, evaluation: Mapping[str, Any]) -> bool:
    run = json_object(folder / RUN)
    recipe = run.get("recipe") if isinstance(run, dict) else None
    optim = recipe.get("optim") if isinstance(recipe, Mapping) else None
    steps, step = optim.get("steps") if isinstance(optim, Mapping) else None, evaluation.get("step")
    return type(steps) is int and type(step) is int and step >= steps


def _scores(listed: Any) -> tuple[Score, ...]:
    found = []
    for entry in _objects(listed):
        path, families = _text(entry.get("path")), _text(entry.get("families"))
        if path:
            name = _text(entry.get("name")) or path
            families = families if families and "*" in families else None
            found.append(Score(name, path, _text(entry.get("title")) or name, main=entry.get("main") is True, families=families))
    return tuple(found)


def _checksums(data: Any) -> dict[str, str]:
    return {clean(str(name)): clean(str(checksum)) for name, checksum in data.items()} if isinstance(data, Mapping) else {}


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    """A name: text or a number as text; None for anything else and for nothing."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return clean(str(value)) or None
