"""What a run folder says of how its numbers came about: command, commit, time, and the curves of training."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megakd.evaluation import report
from megakd.pages.texts import clean, cleaned, json_object
from megakd.runtime.run_folder import METRICS, RUN, read_metrics

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


def record_of(folder: Path) -> Record:
    """Of what can be read there; nothing is raised."""
    content = json_object(folder / RUN)
    run = cleaned(content) if isinstance(content, dict) else {}
    try:
        rows = read_metrics(folder) if (folder / METRICS).exists() else []
    except OSError:
        rows = []
    recipe = run.get("recipe")
    optim = recipe.get("optim") if isinstance(recipe, dict) else None
    trained = [row for row in rows if "loss" in row]
    name = PLAIN_LOSS if any(number(losses_of(row).get(PLAIN_LOSS)) is not None for row in trained) else "loss"
    values = [(row["step"], number(losses_of(row).get(name) if name == PLAIN_LOSS else row["loss"])) for row in trained]
    speeds = [speed for row in trained if (speed := number(row.get("images_per_second")))]
    versions = run.get("versions")
    return Record(
        command=command_line(run.get("argv")),
        commit=run["commit"] if isinstance(run.get("commit"), str) else "",
        versions={str(key): str(value) for key, value in versions.items()} if isinstance(versions, dict) else {},
        device=run["device"] if isinstance(run.get("device"), str) else "",
        hours=hours_trained(trained, optim.get("steps") if isinstance(optim, dict) else None),
        images_per_second=statistics.median(speeds) if speeds else None,
        loss_name=name,
        loss=tuple((step, value) for step, value in values if value is not None),
        evaluations=scores_by_step(rows),
    )


def command_line(argv: Any) -> str:
    """The launcher's command line as one types it, without what a launcher adds and without where megakd lies."""
    if not isinstance(argv, list) or not argv:
        return ""
    words = [str(word) for word in argv if not str(word).startswith("--local_rank")]
    program = "megakd/train.py" if Path(words[0]).name == "train.py" else words[0]
    return f"deepspeed {shlex.join([program, *words[1:]])}" if program == "megakd/train.py" else shlex.join(words)


def hours_trained(trained: list[dict[str, Any]], steps: Any) -> float | None:
    """The seconds of all rows; steps after the last row, or before a damaged one, at the same pace."""
    timed = [
        (row["step"], sum(filter(None, map(number, row["seconds"].values())))) for row in trained if isinstance(row.get("seconds"), dict)
    ]
    if not timed or not timed[-1][0]:
        return None
    total = sum(seconds for _, seconds in timed)
    last = timed[-1][0]
    return total / 3600 * (steps / last if type(steps) is int and steps > last else 1.0)


def scores_by_step(rows: list[dict[str, Any]]) -> dict[str, tuple[tuple[int, float], ...]]:
    """(step, value) of every number of the evaluations among rows of metrics.jsonl, by path."""
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


def losses_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row's losses by name, unweighted."""
    losses = row.get("losses")
    return losses if isinstance(losses, dict) else {}


def number(value: Any) -> float | None:
    """None for what is no finite number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
