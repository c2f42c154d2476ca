"""Samples/s of the training loader against open_clip's webdataset loader: the same shards, workers, batch and augmentation."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from megakd.benchmarks.common import comparison, environment, material
from megakd.benchmarks.common.children import ended_by_sigterm, running
from megakd.benchmarks.common.comparison import OURS, THEIRS

SIZE, SECOND_SIZE = 224, 336
WARM_UP = 4  # batches a worker, before the clock starts: queues full, words in the tokenizer's memory, tars in the page cache
SECONDS = 900  # patience with one measurement
NOTES = [
    f"same on both sides: tar shards, workers, batch, random resized crop of .9 to 1 to {SIZE} px, bicubic, no flip, open_clip's "
    "tokenizer; every batch ends as normalised float32 pixels and int64 tokens in the main process",
    f"{OURS} ships uint8 and normalises in the main process, which is counted here; {THEIRS} normalises in the workers and ships floats",
    f"{OURS} reads samples in an exact, resumable order from an index; {THEIRS} streams tars through a shuffle buffer of 5000 samples",
    "left out on both sides: start-up, indexing, filling the shuffle buffer, and the first batches",
]


def run(rounds: int, workers: int, batch: int = 64, batches: int = 32, file: Path | None = None) -> None:
    """Compare and print as `step.run` does, with our figure for two towers of different sizes as well.

    workers: decoding processes of each side; batch: samples; batches: timed ones of all workers together.
    Raises ValueError when open_clip's environment cannot be set up and when a side fails, with its last lines.
    """
    material.check_workers(workers)
    timed = -(-batches // workers) * workers  # batches come in turns of the workers: whole turns alone are timed
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-bench-") as name:
        env, shards, folder = environment.set_up(), material.shards(environment.cache()), Path(name)
        common = {"batch": batch, "workers": workers, "warm_up": WARM_UP * workers, "batches": timed}
        two: list[float] = []
        busy: dict[str, list[float]] = {OURS: [], THEIRS: []}

        def ours(number: int) -> list[float]:
            settings = {"shards": shards.pattern, **common}
            one_tower = _ask(sys.executable, "ours", {**settings, "sizes": [SIZE]}, folder)
            two.append(_ask(sys.executable, "ours", {**settings, "sizes": [SIZE, SECOND_SIZE]}, folder)["samples_per_second"])
            busy[OURS].append(one_tower["processor_ms"])
            return [one_tower["samples_per_second"]]

        def theirs(number: int) -> list[float]:
            found = _ask(str(env.python), "theirs", {"shards": shards.braces, "size": SIZE, **common}, folder)
            busy[THEIRS].append(found["processor_ms"])
            return [found["samples_per_second"]]

        result = comparison.alternate(rounds, ours, theirs)
    mine, others = median(busy[OURS]), median(busy[THEIRS])
    notes = [
        f"processor milliseconds a sample, without waiting for a processor that others use: {OURS} {mine:.3f}, {THEIRS} {others:.3f}, "
        f"{THEIRS} / {OURS} {others / mine:.3f}",
        f"{OURS} with a second tower of {SECOND_SIZE} px from the same decoded image: {median(two):.1f} samples/s",
        *NOTES,
    ]
    settings = {**common, "size": SIZE, "second_size": SECOND_SIZE}
    where, more = comparison.conditions(env.versions, threads=1), {"two_towers": two, "processor_ms": busy}
    comparison.report("bench loader", "samples/s", result, settings, where, notes, more, file)


def _ask(python: str, side: str, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    command = [python, "-P", str(Path(__file__).with_name("loader_side.py")), side, json.dumps(settings)]
    with running(command, folder, "loader", threads=1) as child:
        return child.wait_for(lambda: answer(child.text()), SECONDS)


def answer(text: str) -> dict[str, float] | None:
    """A side's last words; None as long as they have not been written to the end."""
    for line in text.splitlines():
        if line.startswith('{"samples_per_second"') and line.endswith("}"):
            found: dict[str, float] = json.loads(line)
            return found
    return None
