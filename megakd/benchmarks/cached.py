"""Training images/s from a store of embeddings against the live teacher: the same program, data, models and batch, alternated.

The teacher's forward costs ten times the student's forward and backward, between what ViT-bigG-14 (9) and EVA02-E-14-plus (19) cost a
ViT-B/16 student. Then 11 is the most that a store can bring; what it brings less is data, loss and update, which both sides have.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megakd.benchmarks.common import comparison, environment, material, side_by_side
from megakd.benchmarks.common.children import ended_by_sigterm, running
from megakd.benchmarks.common.comparison import Comparison, Round
from megakd.benchmarks.common.logs import Step, our_steps
from megakd.benchmarks.common.side_by_side import PAIR_SECONDS, START_SECONDS, WARM_UP
from megakd.models import clip
from megakd.recipe import Student
from megakd.runtime import run_folder

TEACHER: dict[str, Any] = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 384, "layers": 12, "head_width": 64},
    "text_cfg": {"context_length": 77, "width": 192, "heads": 3, "layers": 8},
}
STUDENT: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 96, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 77, "width": 64, "heads": 2, "layers": 3},
}
STORED, LIVE = "store", "live teacher"
NOTES = [
    "same on both sides: shards, batch, order, augmentation of .9 to 1 without flip, AdamW, contrastive + similarity KD at weight 1, fp32, "
    "threads, workers, one process; random weights: speed alone is compared",
    f"left out: start-up, {WARM_UP} warm-up steps, and making the store, which costs one epoch of the teacher's forwards",
    "counted: waiting for data, reading the store (done in the loader's workers) and writing one log line a step",
]


@dataclass(frozen=True)
class CachedBenchmark:
    """One comparison. pattern: shards, as a recipe names them; models as recipes' `architecture`."""

    pattern: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    batch: int
    steps: int
    workers: int
    threads: int

    def recipe(self, store: Path | None) -> dict[str, Any]:
        """The run's recipe, as a run.json holds it."""
        teacher = {"architecture": self.teacher, "pretrained": clip.RANDOM} | ({"store": str(store)} if store else {})
        student = {"architecture": self.student}
        return side_by_side.recipe("bench-cached", self.pattern, student, teacher, self.batch, self.workers)


def run(rounds: int, batch: int, steps: int, workers: int = 1, threads: int = 1, file: Path | None = None) -> None:
    """Compare and print: each round, the medians, their ratio, where the time goes, and a line of JSON.

    batch: pairs a step; steps: timed steps a side and round; workers: decoding processes; threads: OpenMP threads of each side.
    Raises ValueError when a side fails, with its last lines.
    """
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-bench-") as name:
        shards = material.shards(environment.cache())
        # an epoch of the fewest whole shards that one round's steps fill: all of them is ten minutes of teacher on a CPU
        count = min(material.SHARDS, -(-batch * (WARM_UP + steps) // material.SAMPLES_A_SHARD))
        if batch > count * material.SAMPLES_A_SHARD:
            raise ValueError(f"--batch {batch}: the benchmark's shards hold {shards.samples} pairs; ask for less")
        pattern = f"{shards.folder}/{{00000..{count - 1:05d}}}.tar"
        job = CachedBenchmark(pattern, TEACHER, STUDENT, batch, steps, workers, threads)
        store, samples = Path(name) / "store", count * material.SAMPLES_A_SHARD
        print(f"embedding {samples} pairs once", flush=True)
        make_store(job, store, samples, Path(name))
        measured = [_round(job, store, Path(name), number, rounds) for number in range(rounds)]
    result = Comparison([Round(*(rates(steps) for steps in sides)) for sides in measured])
    _report(job, result, measured, file)


def _round(job: CachedBenchmark, store: Path, folder: Path, number: int, rounds: int) -> tuple[list[Step], list[Step]]:
    """(from the store, live); who goes first changes from round to round."""
    sides: dict[str, Callable[[], list[Step]]] = {
        STORED: lambda: measure(job, folder / f"stored-{number}", store),
        LIVE: lambda: measure(job, folder / f"live-{number}", None),
    }
    found = {side: sides[side]() for side in ((STORED, LIVE) if number % 2 == 0 else (LIVE, STORED))}
    stored, live = (median(rates(found[side])) for side in (STORED, LIVE))
    print(f"round {number + 1}/{rounds}: {STORED} {stored:.2f}/s, {LIVE} {live:.2f}/s, ratio {stored / live:.2f}", flush=True)
    return found[STORED], found[LIVE]


def rates(steps: list[Step]) -> list[float]:
    return [step.images_per_second for step in steps]


def make_store(job: CachedBenchmark, store: Path, samples: int, folder: Path) -> None:
    """The embeddings of all pairs in one view, in a process of its own."""
    recipe = side_by_side.write_recipe(job.recipe(None), folder / "embed.json")
    command = [sys.executable, "-P", "-m", "megakd.cli", "embed", "--recipe", str(recipe), "--views", "1", "--out", str(store)]
    with running(command, folder, "embed", job.threads) as child:
        child.wait_for(lambda: True if ": complete, " in child.text() else None, START_SECONDS + samples * PAIR_SECONDS)


def measure(job: CachedBenchmark, folder: Path, store: Path | None) -> list[Step]:
    """The timed steps of one run of megakd/train.py."""
    with side_by_side.training(job.recipe(store), folder, job.threads) as child:
        return side_by_side.timed(child, lambda: our_steps(folder / "run"), job.steps, job.batch).steps


def cost(architecture: dict[str, Any], *, training: bool) -> int:
    """FLOPs of one pair through both towers, with the backward if `training`: counted by torch on the meta device."""
    with torch.device("meta"):
        model: Any = clip.build(clip.resolve(Student(architecture=architecture), "student"), torch.device("meta"), load_weights=False).clip
    size, length = architecture["vision_cfg"]["image_size"], architecture["text_cfg"]["context_length"]
    with FlopCounterMode(display=False) as counter:
        image = model.encode_image(torch.empty((1, 3, size, size), device="meta"))
        text = model.encode_text(torch.zeros((1, length), dtype=torch.long, device="meta"))
        if training:
            (image.sum() + text.sum()).backward()
    return int(counter.get_total_flops())


def _report(job: CachedBenchmark, result: Comparison, measured: list[tuple[list[Step], list[Step]]], file: Path | None) -> None:
    teacher, student = cost(job.teacher, training=False), cost(job.student, training=True)
    parts = [
        {part: median(step.seconds.get(part, 0.0) for steps in side for step in steps) for part in side[0][0].seconds}
        for side in zip(*measured, strict=True)
    ]
    where = comparison.conditions({"torch": torch.__version__}, job.threads)
    print(f"bench cached, images/s, medians of {len(measured)} rounds: {STORED} {result.ours:.2f}, {LIVE} {result.theirs:.2f}")
    print(f"ratio of the medians {result.ratio:.2f} | median of the rounds' ratios {result.paired:.2f}")
    print(f"teacher's forward {teacher / 1e9:.2f} GFLOPs a pair, student's step {student / 1e9:.3f}: {teacher / student:.1f} to 1")
    for side, seconds in zip((STORED, LIVE), parts, strict=True):
        print(f"{side}: median seconds a step: " + ", ".join(f"{part} {value:.3f}" for part, value in seconds.items()))
    for note in NOTES:
        print(f"- {note}")
    row = {
        "benchmark": "bench cached", "unit": "images/s", "stored": result.ours, "live": result.theirs, "ratio": result.ratio,
        "ratio_paired": result.paired, "flops": {"teacher_forward": teacher, "student_step": student},
        "seconds": {STORED: parts[0], LIVE: parts[1]}, **where,
        "settings": {"batch": job.batch, "steps": job.steps, "workers": job.workers},
        "rounds": [{"stored": each.ours, "live": each.theirs} for each in result.rounds],
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    if file is not None:
        run_folder.write_json(file, row)
