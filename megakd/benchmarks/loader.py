"""Samples/s of the training loader against open_clip's webdataset loader: the same shards, workers, batch and augmentation.

A row for each size of the pictures and each way to make their pixels (`data.resampling`, `data.decode`), which are never mixed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from megakd.benchmarks import loader_material
from megakd.benchmarks.common import comparison, environment, material
from megakd.benchmarks.common.children import ended_by_sigterm, running
from megakd.benchmarks.common.comparison import OURS, THEIRS
from megakd.runtime.console import plain

SIZE, SECOND_SIZE = 224, 336
WARM_UP = 4  # batches a worker, before the clock starts: queues full, words in the tokenizer's memory, tars in the page cache
SECONDS = 900  # patience with one measurement
TARGET = 1.5  # samples/s and processor time, against open_clip's
DEFAULT, TORCH, SCALED = "default", "torch", "torch, scaled"
WAYS: dict[str, dict[str, str]] = {DEFAULT: {}, TORCH: {"resampling": "torch"}, SCALED: {"resampling": "torch", "decode": "scaled"}}
_TWO_TOWERS = "two towers"
NOTES = [
    f"same on both sides: tar shards, workers, batch, random resized crop of .9 to 1 to {SIZE} px, bicubic, no flip, open_clip's "
    "tokenizer; every batch ends as normalised float32 pixels and int64 tokens in the main process",
    f'{DEFAULT}: whole images, resized by Pillow, as {THEIRS} does; torch: data.resampling = "torch", whole images; '
    f'scaled: with data.decode = "scaled" too, where a crop can be twice {SIZE} px',
    f"{OURS} ships uint8 and normalises in the main process, which is counted here; {THEIRS} normalises in the workers and ships floats",
    f"{OURS} reads samples in an exact, resumable order from an index; {THEIRS} streams tars through a shuffle buffer of 5000 samples",
    "left out on both sides: start-up, indexing, filling the shuffle buffer, and the first batches",
    "processor: milliseconds a sample, without waiting for a processor that others use; the verdict is of the smaller of both ratios",
]


@dataclass
class Measured:
    """A side's rounds: samples_per_second and processor_ms a sample, of each."""

    rates: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def add(self, found: dict[str, float]) -> None:
        self.rates.append(found["samples_per_second"])
        self.busy.append(found["processor_ms"])


def run(
    rounds: int, workers: int, batch: int = 64, batches: int = 32, sources: str = loader_material.SET, file: Path | None = None
) -> None:
    """Compare and print, with our figure for two towers of different sizes as well, on the first source.

    workers: decoding processes of each side; batch: samples; batches: timed ones of all workers together; sources: names of
    `loader_material.sources`, with commas. In each round every side measures every source once; who is first changes.
    Raises ValueError when open_clip's environment cannot be set up and when a side fails, with its last lines.
    """
    material.check_workers(workers)
    names = loader_material.sources(sources)
    timed = -(-batches // workers) * workers  # batches come in turns of the workers: whole turns alone are timed
    common = {"batch": batch, "workers": workers, "warm_up": WARM_UP * workers, "batches": timed}
    results: dict[str, dict[str, Measured]] = {}
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-bench-") as name:
        env, folder = environment.set_up(), Path(name)
        for source in names:
            shards = loader_material.shards(environment.cache(), source)
            here = results[source] = {side: Measured() for side in sides(source, first=source == names[0])}
            for number in range(rounds):
                for side in here if number % 2 == 0 else reversed(here):
                    if side == THEIRS:
                        found = _ask(str(env.python), "theirs", {"shards": shards.braces, "size": SIZE, **common}, folder)
                    else:
                        sizes = [SIZE, SECOND_SIZE] if side == _TWO_TOWERS else [SIZE]
                        settings = {"shards": shards.pattern, **common, "sizes": sizes, "data": WAYS.get(side, {})}
                        found = _ask(sys.executable, "ours", settings, folder)
                    here[side].add(found)
                shown = ", ".join(f"{side} {measured.rates[-1]:.1f}/s" for side, measured in here.items())
                print(f"{source}: round {number + 1}/{rounds}: {shown}", flush=True)
    found_rows = [row for source, here in results.items() for row in rows(source, here)]
    two = results[names[0]][_TWO_TOWERS]
    _report(found_rows, two, {**common, "size": SIZE, "second_size": SECOND_SIZE, "sources": names}, env.versions, file)


def sides(source: str, first: bool) -> list[str]:
    """What is measured on a source: scaled decoding where a crop's shorter side can be twice the tower's."""
    scaled = [SCALED] if loader_material.short_side(source) >= 2 * SIZE else []
    return [DEFAULT, TORCH, *scaled, *([_TWO_TOWERS] if first else []), THEIRS]


def rows(source: str, measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """One for each of our ways, beside open_clip's figures of the same rounds."""
    theirs = measured[THEIRS]
    made = []
    for way in WAYS:
        if (ours := measured.get(way)) is None:
            continue
        ratio = median(ours.rates) / median(theirs.rates)
        processor = median(theirs.busy) / median(ours.busy)
        made.append({
            "source": source, "way": way, "data": WAYS[way], "ours": median(ours.rates), "theirs": median(theirs.rates), "ratio": ratio,
            "ours_processor_ms": median(ours.busy), "theirs_processor_ms": median(theirs.busy), "processor_ratio": processor,
            "rounds": [one / other for one, other in zip(ours.rates, theirs.rates, strict=True)],
            "target": TARGET, "reached": min(ratio, processor) >= TARGET,
        })  # fmt: skip
    return made


def _report(found: list[dict[str, Any]], two: Measured, settings: dict[str, Any], versions: dict[str, str], file: Path | None) -> None:
    title = f"bench loader: samples/s, and processor ms a sample; ratios against {THEIRS}'s, target {TARGET}"
    table = Table(
        "source", "way", OURS, THEIRS, "ratio", "rounds", "ms", "ms", "processor ratio", "verdict", title=title, title_justify="left"
    )
    for row in found:
        table.add_row(
            row["source"], row["way"], f"{row['ours']:.0f}", f"{row['theirs']:.0f}", f"{row['ratio']:.2f}",
            f"{min(row['rounds']):.2f}-{max(row['rounds']):.2f}", f"{row['ours_processor_ms']:.2f}", f"{row['theirs_processor_ms']:.2f}",
            f"{row['processor_ratio']:.2f}", "reached" if row["reached"] else "missed",
        )  # fmt: skip
    console = plain()
    console.print(table)
    two_towers = f"{OURS}, {DEFAULT}, with a second tower of {SECOND_SIZE} px from the same decoded image, on {settings['sources'][0]}"
    for note in (f"{two_towers}: {median(two.rates):.1f} samples/s", *NOTES):
        console.print(f"- {note}", markup=False)
    where = comparison.conditions(versions, threads=1)
    comparison.say_where(where)
    comparison.record(
        {"benchmark": "bench loader", "unit": "samples/s", "rows": found, "two_towers": two.rates, "settings": settings, **where}, file
    )


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
