"""RUN/best: what a run would have written at its end, made of the weights of its best evaluation so far, by `checkpoint.best`.

    best/best.json      score (its path), value, step, and weights ("current" or "ema")
    best/model, bundle  as RUN/model and RUN/bundle

It is written anew in one piece before the row of a better evaluation goes to metrics.jsonl, and each evaluation comes with a checkpoint.
So a start that goes on from the newest one finds the best of the steps behind it, whenever the one before was killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megakd.recipe.best import BestScore
from megakd.runtime import files, run_folder
from megakd.runtime.run_folder import BEST

RECORD = "best.json"


def read(run: Path, score: BestScore | None = None) -> dict[str, Any] | None:
    """The record of RUN/best; None without one, or where it is by another score than `score`."""
    try:
        record = json.loads((run / BEST / RECORD).read_text(encoding="utf-8"))
        known = {
            "score": str(record["score"]),
            "value": float(record["value"]),
            "step": int(record["step"]),
            "weights": str(record["weights"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = score is None or (known["score"], known["weights"]) == (score.name, _weights(score))
    return known if same else None


def keep(run: Path, score: BestScore, results: Mapping[str, Any], write: Callable[[Path], None]) -> str | None:
    """Have `write` fill a folder and put it in the place of RUN/best, where this evaluation is the first or better. Rank 0 alone.

    Returns a line for people where it did. Raises ValueError as `BestScore.of`, and OSError.
    """
    value, step, before = score.of(results), results["step"], read(run, score)
    if before is not None and not score.is_better(value, before["value"]):
        return None
    with files.atomic_folder(run / BEST) as partial:
        write(partial)
        record = {"score": score.name, "value": value, "step": step, "weights": _weights(score)}
        run_folder.write_json(partial / RECORD, record)
    return f"best so far: {score.name} = {value:.4g} at step {step}, kept in {run / BEST}"


def set_aside(run: Path, step: int) -> str | None:
    """Move RUN/best to RUN/previous where it is of steps past `step`, which a run goes on from. Returns a line for people where it did."""
    record = read(run)
    if record is None or record["step"] <= step:
        return None
    aside = run_folder.archive(run, [run / BEST])
    return f"{run / BEST} is of step {record['step']}, which is still to come: it was moved to {aside}, and the best is looked for anew"


def _weights(score: BestScore) -> str:
    return "ema" if score.averaged else "current"
