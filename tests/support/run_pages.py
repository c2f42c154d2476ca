"""Run folders for the page of a run: a finished one's numbers without a training, and edits of real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.study_folders import evaluation, write_json

STEPS = 40


def write_long_run(folder: Path, more: Mapping[str, Any] | None = None, **about: Any) -> Path:
    """A finished run of 40 steps with a row each, two objectives, a resume at step 20 and an evaluation each 10 steps; the losses fall.

    more: sections of its recipe that differ; about: keys of run.json.
    """
    recipe: dict[str, Any] = {
        "name": "long", "seed": 0, "data": {"train": "pairs/*.tar"}, "student": {"model": "ViT-S-32", "max_scale": 100.0},
        "objectives": {"contrastive": 1.0, "similarity": 2.0}, "optim": {"steps": STEPS, "batch": 10, "lr": 1e-3, "warmup": 4},
        "teacher": {"model": "ViT-B-32"}, "evaluation": {"retrieval": {"test": "test/*.tar"}}, **(more or {}),
    }  # fmt: skip
    ended = {"time": "2026-11-29T12:00:00+0000", "how": "finished", "words": ""}
    starts = [{"started": "a", "ranks": 1, "from_step": 0}, {"started": "b", "ranks": 2, "from_step": 20, "ended": ended}]
    write_json(folder / "run.json", {"recipe": recipe, "argv": ["megakd/train.py"], "jobs": starts, **about})
    write_rows(folder, [row(step) for step in range(1, STEPS + 1)])
    write_json(folder / "evaluation.json", evaluation(0.4, 0.3, STEPS))
    (folder / "model").mkdir()
    return folder


def row(step: int, **more: Any) -> dict[str, Any]:
    """Of metrics.jsonl; the second start, from step 20, counts bad samples anew."""
    losses = {"contrastive": 4.0 - step / 20, "similarity": 1.0 - step / 80}
    seconds = {"data": 0.01, "teacher": 0.02, "student": 0.05, "loss": 0.01, "update": 0.01, "other": 0.0}
    return {
        "step": step, "loss": losses["contrastive"] + 2 * losses["similarity"], "losses": losses, "backends": {}, "lr": 1e-3, "scale": 14.0,
        "gradient_norm": 1.0 + step % 3 / 10, "images_per_second": 100.0, "memory_gb": 1.5, "seconds": seconds,
        "bad_samples": {"corrupt_image": (step if step <= 20 else step - 20) // 10}, **more,
    }  # fmt: skip


def write_rows(folder: Path, rows: list[dict[str, Any]], every: int = 10) -> None:
    """metrics.jsonl of these rows, with an evaluation after each `every`th step, whose scores rise."""
    lines = []
    for one in rows:
        step = one["step"]
        lines.append(one)
        if step % every == 0:
            lines.append({"step": step, "event": "evaluation", "content": evaluation(step / 100, step / 200, step)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
