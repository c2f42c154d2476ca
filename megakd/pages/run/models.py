"""The student beside its teachers: size, speed, and the scores that a teacher's own run has on the same sets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megakd.evaluation import report
from megakd.models.pretrained import LOCAL
from megakd.pages.names import model_name
from megakd.pages.records import number
from megakd.pages.run.reading import RunFiles
from megakd.pages.tables import Cell, Column, Table, count, name
from megakd.pages.texts import cleaned, json_object
from megakd.runtime.run_folder import EVALUATION


@dataclass(frozen=True)
class ModelRow:
    """One model of a run; None for what no file tells. scores: of a teacher's own run, by path; remark: why there are none."""

    role: str
    model: str
    parameters: float | None
    size: float | None
    images_per_second: float | None
    scores: Mapping[str, float] = field(default_factory=dict)
    remark: str = ""


def rows(run: RunFiles) -> list[ModelRow]:
    """The student and each teacher that has a weight, or might have; empty for a decoder that sees nothing."""
    found = [_student(run)] if run.section("student") else []
    first = {"teacher": run.section("teacher")} if run.section("teacher") else {}
    others = {f"ensemble.{role}": settings for role, settings in run.section("ensemble").items() if isinstance(settings, Mapping)}
    return found + [_teacher(run, role, settings) for role, settings in {**first, **others}.items()]


def table(run: RunFiles) -> Table | None:
    """Parameters, bytes and inference images/s; None where there is no teacher, and the head of the page says the rest."""
    models = rows(run)
    if not any(model.role != "student" for model in models):
        return None
    lines = tuple(
        (
            name(model.role),
            name(model.model),
            count(model.parameters),
            count(model.size, "" if model.size is None else f"{model.size / 1e6:,.1f} MB"),
            count(model.images_per_second),
            name(model.remark or None),
        )
        for model in models
    )
    columns = (
        *(Column("role", numeric=False), Column("model", numeric=False), Column("parameters"), Column("weights in memory")),
        *(Column("inference images/s"), Column("its scores", numeric=False)),
    )
    caption = "`megakd evaluate RUN` measures what is not here; a teacher that a run trained is as its own evaluation.json has it."
    return Table("models", "Student and teacher", caption, columns, lines)


def _student(run: RunFiles) -> ModelRow:
    known = _measured(run.final, "student")
    parameters, speed = (_first(known.get(key), run.final.get(key)) for key in ("parameters", "images_per_second"))
    return ModelRow("student", model_name(run.section("student")), parameters, number(known.get("bytes")), speed)


def _teacher(run: RunFiles, role: str, settings: Mapping[str, Any]) -> ModelRow:
    known, model = _measured(run.final, role), settings.get("model")
    own: Mapping[str, Any] = {}
    scores: Mapping[str, float] = {}
    remark = "of `megakd evaluate --model`"
    if isinstance(model, str) and model.startswith(LOCAL):
        own, scores, remark = _own_run(run, Path(model.removeprefix(LOCAL)).parent)
    parameters, speed = (_first(known.get(key), own.get(key)) for key in ("parameters", "images_per_second"))
    return ModelRow(role, model_name(settings), parameters, number(known.get("bytes")), speed, scores, remark)


def _own_run(run: RunFiles, folder: Path) -> tuple[Mapping[str, Any], Mapping[str, float], str]:
    """(a teacher's evaluation.json, its scores where they are of the same sets as the run's, what is to be said of them)."""
    content = json_object(folder / EVALUATION) if (folder / EVALUATION).is_file() else ""
    if isinstance(content, str):
        return {}, {}, "its run was not evaluated, or is not here"
    own = cleaned(content)
    if not own.get("sets") or own.get("sets") != run.final.get("sets"):
        return own, {}, "of its own run, on other sets"
    try:
        scores = {path: value for path, value in report.numbers(own).items() if math.isfinite(value)}
    except (RecursionError, TypeError, AttributeError):
        return own, {}, "its evaluation.json is damaged"
    return own, scores, "of its own run, on the same sets: beside the student's above"


def _measured(final: Mapping[str, Any], role: str) -> Mapping[str, Any]:
    models = final.get("models")
    known = models.get(role) if isinstance(models, Mapping) else None
    return known if isinstance(known, Mapping) else {}


def _first(*values: Any) -> float | None:
    return next((known for value in values if (known := number(value)) is not None), None)


def beside(models: list[ModelRow], path: str) -> list[Cell]:
    """A score of each teacher that has any, for a row of the student's."""
    values = [model.scores.get(path) for model in models if model.scores]
    return [Cell("–") if value is None else Cell(f"{100 * value:.1f}", value) for value in values]
