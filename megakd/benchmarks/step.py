"""Training images/s against open_clip's own distillation loop: the same shards, models, batch and precision, one process each.

1. `environment` holds open_clip's training program, `material` the shards and the teacher's weights of both.
2. Each round starts `megakd/train.py` and `open_clip_train.main`, lets each make its warm-up and timed steps, and kills it.
3. `logs` reads the times from what each wrote itself; `comparison` takes medians.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megakd.benchmarks.common import comparison, environment, material, side_by_side
from megakd.benchmarks.common.children import ended_by_sigterm, running
from megakd.benchmarks.common.comparison import OURS, THEIRS
from megakd.benchmarks.common.logs import open_clip_steps, our_steps, share_beside_towers
from megakd.benchmarks.common.material import Shards
from megakd.benchmarks.common.side_by_side import UNREACHED, WARM_UP, Timed, timed

TEACHER, STUDENT = "ViT-B-32", "ViT-S-32"
NOTES = [
    "same on both sides: tar shards, ViT-B-32 teacher (one file of random weights), ViT-S-32 student from scratch, 224 px, random resized "
    "crop of .9 to 1 without flip, contrastive + similarity-matrix KD at weight 1, AdamW, gradient clipping at 1, fp32, threads, workers, "
    "one process",
    f"left out on both sides: start-up and {WARM_UP} warm-up steps; counted on both: waiting for data and writing one log line a step",
    f"{OURS} alone: DeepSpeed's engine, a check for non-finite losses before each update, fused AdamW, exact sample order, uint8 pixels "
    "from the workers normalised in the trainer, once a tower",
    f"{THEIRS} alone: float pixels from the workers, AdamW unfused (its default), a clamp of the logit scale, a streaming shuffle",
    f"the losses have equal gradients ({THEIRS} reports the cross-entropy to the teacher, {OURS} the KL divergence); {THEIRS}'s global "
    "loss and --local-loss differ with several ranks alone, and this is one",
    "random weights: speed alone is compared; on a CPU the models take nearly all of a step, so the ratio is near 1",
]


@dataclass(frozen=True)
class StepBenchmark:
    """One comparison. teacher_weights: a file; models by open_clip name, or as a recipe's `architecture` on our side."""

    shards: Shards
    teacher: dict[str, Any]
    student: dict[str, Any]
    batch: int
    steps: int
    workers: int
    threads: int

    def recipe(self) -> dict[str, Any]:
        """Our side's, as a run.json holds it."""
        made = side_by_side.recipe("bench-step", self.shards.pattern, self.student, self.teacher, self.batch, self.workers)
        return {**made, "optim": {**made["optim"], "weight_decay": 0.2, "clip": 1.0}}


def run(rounds: int, batch: int, steps: int, workers: int = 1, threads: int = 1, file: Path | None = None) -> None:
    """Compare and print: each round, the medians, their ratio, our step's share beside the towers, and a line of JSON.

    batch: pairs a step; steps: timed steps a side and round; workers: decoding processes; threads: OpenMP threads of each side.
    Raises ValueError when open_clip's environment cannot be set up and when a side fails, with its last lines.
    """
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-bench-") as name:
        env, shards = environment.set_up(), material.shards(environment.cache())
        if batch > shards.samples:
            raise ValueError(f"--batch {batch}: the benchmark's shards hold {shards.samples} pairs; ask for less")
        material.check_workers(workers)
        weights = str(material.teacher_weights(environment.cache(), TEACHER))
        job = StepBenchmark(shards, {"model": TEACHER, "pretrained": weights}, {"model": STUDENT}, batch, steps, workers, threads)
        our_rounds: list[Timed] = []
        their_rounds: list[Timed] = []

        def ours(number: int) -> list[float]:
            our_rounds.append(measure_ours(job, Path(name) / f"ours-{number}"))
            return our_rounds[-1].rates

        def theirs(number: int) -> list[float]:
            their_rounds.append(measure_theirs(job, env.python, Path(name) / f"theirs-{number}"))
            return their_rounds[-1].rates

        result = comparison.alternate(rounds, ours, theirs)
    measured = [step for each in our_rounds for step in each.steps]
    parts = {part: median(step.seconds.get(part, 0.0) for step in measured) for part in measured[0].seconds}
    beside = share_beside_towers(measured)
    shown = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
    busy = {side: median(each.processor_seconds for each in done) for side, done in ((OURS, our_rounds), (THEIRS, their_rounds))}
    notes = [
        f"processor seconds a step, without waiting for a processor that others use: {OURS} {busy[OURS]:.2f}, {THEIRS} {busy[THEIRS]:.2f}, "
        f"{THEIRS} / {OURS} {busy[THEIRS] / busy[OURS]:.3f}",
        f"{beside:.1%} of our step is neither teacher forward nor student forward and backward; median seconds: {shown}",
        *NOTES,
    ]
    models = {"teacher": TEACHER, "student": STUDENT, "precision": "fp32"}
    settings = {**models, "batch": batch, "steps": steps, "warm_up": WARM_UP, "workers": workers}
    more = {"share_beside_towers": beside, "seconds": parts, "processor_seconds": busy}
    comparison.report("bench step", "images/s", result, settings, comparison.conditions(env.versions, threads), notes, more, file)


def measure_ours(job: StepBenchmark, folder: Path) -> Timed:
    """The timed steps of megakd/train.py."""
    with side_by_side.training(job.recipe(), folder, job.threads) as child:
        return timed(child, lambda: our_steps(folder / "run"), job.steps, job.batch)


def measure_theirs(job: StepBenchmark, python: Path, folder: Path) -> Timed:
    """The timed steps of open_clip_train.main."""
    with running(open_clip_command(job, python, folder), folder, "theirs", job.threads) as child:
        return timed(child, lambda: open_clip_steps(child.text()), job.steps, job.batch)


def open_clip_command(job: StepBenchmark, python: Path, folder: Path) -> list[str]:
    """open_clip's own program with its own defaults, but for what the comparison holds equal."""
    settings = {
        "train-data": job.shards.braces, "dataset-type": "webdataset", "train-num-samples": UNREACHED * job.batch, "workers": job.workers,
        "batch-size": job.batch, "epochs": 1, "precision": "fp32", "model": job.student["model"],
        "distill-model": job.teacher["model"], "distill-pretrained": job.teacher["pretrained"],
        "lr": 1e-4, "warmup": 1000, "wd": 0.2, "grad-clip-norm": 1.0, "log-every-n-steps": 1, "logs": folder / "logs", "name": "bench",
    }  # fmt: skip
    flags = itertools.chain.from_iterable((f"--{flag}", str(value)) for flag, value in settings.items())
    return [str(python), "-P", "-m", "open_clip_train.main", *flags]
