"""Training images/s from a store of embeddings against the live teacher: the same program, data, models and batch, alternated.

The teacher's forward costs ten times the student's forward and backward, between what ViT-bigG-14 (9) and EVA02-E-14-plus (19) cost a
ViT-B/16 student. Then 11 is the most that a store can bring; what it brings less is data, loss and update, which both sides have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megakd.benchmarks.common import comparison, environment, material, side_by_side
from megakd.benchmarks.common.children import ended_by_sigterm
from megakd.benchmarks.common.logs import Step, our_steps
from megakd.benchmarks.common.side_by_side import WARM_UP, timed
from megakd.models import clip
from megakd.recipe import Student

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


def run(rounds: int, batch: int, steps: int, workers: int = 1, threads: int = 1, file: Path | None = None) -> None:
    """Compare and print: each round, the medians, their ratio, where the time goes, and a line of JSON.

    batch: pairs a step; steps: timed steps a side and round; workers: decoding processes; threads: OpenMP threads of each side.
    Raises ValueError when a side fails, with its last lines.
    """
    measured: dict[str, list[Step]] = {STORED: [], LIVE: []}
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-bench-") as name:
        # an epoch of the fewest whole shards that one round's steps fill: all of them is ten minutes of teacher on a CPU
        shards, folder = material.shards(environment.cache(), material.shards_of(batch * (WARM_UP + steps))), Path(name)
        if batch > shards.samples:
            raise ValueError(f"--batch {batch}: the benchmark's shards hold {shards.samples} pairs; ask for less")

        def recipe(**store: str) -> dict[str, Any]:
            teacher = {"architecture": TEACHER, "pretrained": clip.RANDOM, **store}
            return side_by_side.recipe("bench-cached", shards.pattern, {"architecture": STUDENT}, teacher, batch, workers)

        def side(name: str, recipe: dict[str, Any]) -> Callable[[int], list[float]]:
            def rates(number: int) -> list[float]:
                place = folder / f"{name.replace(' ', '-')}-{number}"
                with side_by_side.training(recipe, place, threads) as child:
                    found = timed(child, lambda: our_steps(place / "run"), steps, batch)
                measured[name] += found.steps
                return found.rates

            return rates

        store = folder / "store"
        side_by_side.embed(recipe(), store, folder, shards.samples, threads)
        result = comparison.alternate(rounds, side(STORED, recipe(store=str(store))), side(LIVE, recipe()), (STORED, LIVE))
    teacher, student = cost(TEACHER, training=False), cost(STUDENT, training=True)
    parts = {
        side: {part: median(step.seconds.get(part, 0.0) for step in done) for part in done[0].seconds} for side, done in measured.items()
    }
    shown = {side: ", ".join(f"{part} {value:.3f}" for part, value in seconds.items()) for side, seconds in parts.items()}
    notes = [
        f"teacher's forward {teacher / 1e9:.2f} GFLOPs a pair, student's step {student / 1e9:.3f}: {teacher / student:.1f} to 1",
        *(f"{side}: median seconds a step: {seconds}" for side, seconds in shown.items()),
        *NOTES,
    ]
    settings = {"batch": batch, "steps": steps, "workers": workers}
    more = {"flops": {"teacher_forward": teacher, "student_step": student}, "seconds": parts}
    where = comparison.conditions({"torch": torch.__version__}, threads)
    comparison.report("bench cached", "images/s", result, settings, where, notes, more, file)


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
