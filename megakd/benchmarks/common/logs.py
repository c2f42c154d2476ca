"""Per-step times from what the two programs write themselves: open_clip's log lines, this program's metrics.jsonl."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

# Train Epoch: 0 [ 32/512 (6%)] Data (t): 0.312 Batch (t): 4.512, 7.09220/s, 7.09220/s/gpu LR: 0.000001 Logit Scale: 14.286 ...
_OPEN_CLIP = re.compile(
    r"Train Epoch: \d+ \[\s*\d+/\d+ \(\d+%\)\] Data \(t\): (?P<data>[0-9.]+) Batch \(t\): (?P<batch>[0-9.]+), (?P<rate>[0-9.e+-]+)/s"
)
# This program's own names of the time spent inside the two models; the backward counts as the student's.
TOWERS = ("teacher", "student")


@dataclass(frozen=True)
class Step:
    """One optimiser step. images_per_second: pairs over the whole step, waiting for data and writing the log included.

    seconds: parts of the step by name, as far as the program tells.
    """

    images_per_second: float
    seconds: dict[str, float]


def open_clip_steps(text: str) -> list[Step]:
    """The steps in open_clip's log, which must have been written with --log-every-n-steps 1: its meters are means since the last line."""
    found = _OPEN_CLIP.finditer(text)
    return [Step(float(line["rate"]), {"data": float(line["data"]), "step": float(line["batch"])}) for line in found]


def our_steps(run: Path) -> list[Step]:
    """The steps in a run folder's metrics.jsonl, written with log.every = 1. An incomplete last line is left for later."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [row for row in map(json.loads, lines) if "images_per_second" in row]
    return [Step(float(row["images_per_second"]), {name: float(value) for name, value in row["seconds"].items()}) for row in rows]


def share_beside_towers(steps: list[Step]) -> float:
    """Fraction of our steps' time that is neither teacher forward nor student forward and backward: data, loss, update, other."""
    total = sum(sum(step.seconds.values()) for step in steps)
    towers = sum(step.seconds.get(name, 0.0) for step in steps for name in TOWERS)
    return 1 - towers / total
