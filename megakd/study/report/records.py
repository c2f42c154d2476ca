"""What a row's run folders say of how its numbers came about: command, commit, time, and the curves of training."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megakd.evaluation import report
from megakd.runtime.run_folder import METRICS, RUN, read_metrics
from megakd.study.results import Row, clean, cleaned, json_object

PLAIN_LOSS = "contrastive"  # what students of every method learn, so that its curves can be compared


@dataclass(frozen=True)
class Record:
    """One run.

    hours: of training, without evaluations and starts; images_per_second: the median of training. loss: (step, value) of InfoNCE where the
    run has it, else of the whole loss, which `loss_name` tells. evaluations: (step, fraction) by path, for evaluations during training.
    """

    command: str = ""
    commit: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    hours: float | None = None
    images_per_second: float | None = None
    loss_name: str = ""
    loss: tuple[tuple[int, float], ...] = ()
    evaluations: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)


def records_of(row: Row) -> list[Record]:
    """The student's run, then its readout's; empty for a row whose runs left nothing. Of a readout alone the first says nothing."""
    if row.readout == row.folder:
        return [Record(), _record(row.folder)] if (row.folder / RUN).exists() else []
    return [_record(folder) for folder in (row.folder, row.readout) if folder is not None and (folder / RUN).exists()]


def _record(folder: Path) -> Record:
    content = json_object(folder / RUN)
    run = cleaned(content) if isinstance(content, dict) else {}
    try:
        rows = read_metrics(folder) if (folder / METRICS).exists() else []
    except OSError:
        rows = []
    recipe = run.get("recipe")
    optim = recipe.get("optim") if isinstance(recipe, dict) else None
    trained = [row for row in rows if "loss" in row]
    name = PLAIN_LOSS if any(_number(_losses(row).get(PLAIN_LOSS)) is not None for row in trained) else "loss"
    values = [(row["step"], _number(_losses(row).get(name) if name == PLAIN_LOSS else row["loss"])) for row in trained]
    speeds = [speed for row in trained if (speed := _number(row.get("images_per_second")))]
    versions = run.get("versions")
    return Record(
        command=_command(run.get("argv")),
        commit=run["commit"] if isinstance(run.get("commit"), str) else "",
        versions={str(key): str(value) for key, value in versions.items()} if isinstance(versions, dict) else {},
        device=run["device"] if isinstance(run.get("device"), str) else "",
        hours=_hours(trained, optim.get("steps") if isinstance(optim, dict) else None),
        images_per_second=statistics.median(speeds) if speeds else None,
        loss_name=name,
        loss=tuple((step, value) for step, value in values if value is not None),
        evaluations=_evaluations(rows),
    )


def _command(argv: Any) -> str:
    """The launcher's command line as one types it, without what a launcher adds and without where megakd lies."""
    if not isinstance(argv, list) or not argv:
        return ""
    words = [str(word) for word in argv if not str(word).startswith("--local_rank")]
    program = "megakd/train.py" if Path(words[0]).name == "train.py" else words[0]
    return f"deepspeed {shlex.join([program, *words[1:]])}" if program == "megakd/train.py" else shlex.join(words)


def _hours(trained: list[dict[str, Any]], steps: Any) -> float | None:
    """The seconds of all rows; steps after the last row, or before a damaged one, at the same pace."""
    timed = [
        (row["step"], sum(filter(None, map(_number, row["seconds"].values())))) for row in trained if isinstance(row.get("seconds"), dict)
    ]
    if not timed or not timed[-1][0]:
        return None
    total = sum(seconds for _, seconds in timed)
    last = timed[-1][0]
    return total / 3600 * (steps / last if type(steps) is int and steps > last else 1.0)


def _evaluations(rows: list[dict[str, Any]]) -> dict[str, tuple[tuple[int, float], ...]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get("event") == "evaluation" and isinstance(row.get("content"), dict):
            try:
                scores = report.numbers(row["content"])
            except (RecursionError, TypeError, AttributeError):
                continue
            for path, value in scores.items():
                if math.isfinite(value):
                    found.setdefault(clean(path), {})[row["step"]] = value
    return {path: tuple(sorted(values.items())) for path, values in found.items()}


def _losses(row: Mapping[str, Any]) -> Mapping[str, Any]:
    losses = row.get("losses")
    return losses if isinstance(losses, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
