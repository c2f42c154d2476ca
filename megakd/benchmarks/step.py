"""Training steps against open_clip's own distillation loop, and compiled towers against plain ones: same shards, models and batch.

1. `environment` holds open_clip's training program, `material` the shards and the teacher's weights of both; a store is embedded once.
2. Each round starts every side once, in turn: `open_clip_train.main`, and `megakd/train.py` with a teacher in float32, in 8 bit, from the
   store, and with compiled towers. Each makes its warm-up and timed steps and is killed.
3. `logs` reads the times from what each wrote itself; `step_rows` compares two sides a row, and says which targets were reached.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megakd.benchmarks import step_rows
from megakd.benchmarks.common import comparison, environment, material, side_by_side, teacher_quality
from megakd.benchmarks.common.children import ended_by_sigterm, running
from megakd.benchmarks.common.comparison import OURS, THEIRS
from megakd.benchmarks.common.logs import open_clip_steps, our_steps, share_beside_towers
from megakd.benchmarks.common.material import Shards
from megakd.benchmarks.common.side_by_side import UNREACHED, WARM_UP, Timed, timed
from megakd.models.int8 import matmul
from megakd.models.int8.agreement import Agreement
from megakd.runtime.console import plain

TEACHER, STUDENT = "ViT-B-32", "ViT-S-32"
LONGEST = {"text_padding": "longest"}  # equal embeddings up to rounding; open_clip pads to 77 tokens always
COMPILING = 4  # warm-up steps of compiled towers: a second length of texts compiles once more, for all lengths
SPARE = 4  # steps that a side may make beside warm-up and timed ones
NOTES = [
    "same on all sides: tar shards, ViT-B-32 teacher (one file of weights), ViT-S-32 student from scratch, 224 px, random resized "
    "crop of .9 to 1 without flip, contrastive + similarity-matrix KD at weight 1, AdamW, gradient clipping at 1, float32, threads, "
    "workers, one process",
    f"left out on all sides: start-up and {WARM_UP} warm-up steps ({COMPILING} of compiled towers); counted on all: waiting for data and "
    "writing one log line a step",
    f"{OURS} alone: texts padded to the longest of a batch (text_padding): a causal tower's embeddings in less time",
    f"{OURS} alone: DeepSpeed's engine, a check for non-finite losses before each update, fused AdamW, exact sample order, uint8 pixels "
    "from the workers normalised in the trainer, once a tower",
    f"{THEIRS} alone: float pixels from the workers, AdamW unfused (its default), a clamp of the logit scale, a streaming shuffle",
    f"the losses have equal gradients ({THEIRS} reports the cross-entropy to the teacher, {OURS} the KL divergence); {THEIRS}'s global "
    "loss and --local-loss differ with several ranks alone, and this is one",
    "processor seconds: of the program and its workers, without waiting for a processor that others use; the targets are of these",
    "random weights: values do not change the speed. The teacher's projection of texts is fitted to the first shard's pairs, so that "
    "they stand out in the similarities that 8 bit has to keep, as a trained teacher's do",
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

    def recipe(self, *, compiled: bool = False, **teacher: Any) -> dict[str, Any]:
        """Our side's, as a run.json holds it. teacher: keys of one side beside those of all; compiled: both towers are."""
        of_both = {**LONGEST, **({"compile": True} if compiled else {})}
        models = ({**of_both, **self.student}, {**of_both, **self.teacher, **teacher})
        made = side_by_side.recipe("bench-step", self.shards.pattern, *models, self.batch, self.workers)
        return {**made, "optim": {**made["optim"], "weight_decay": 0.2, "clip": 1.0}}

    def recipes(self, store: Path) -> dict[str, dict[str, Any]]:
        """Of our sides, by name. store: where the side of that name reads embeddings."""
        return {
            "float32": self.recipe(),
            "int8": self.recipe(mode="replicated_int8", int8_product=fastest_product()),
            "store": self.recipe(store=str(store)),
            "compiled": self.recipe(compiled=True),
        }


def run(
    rounds: int, batch: int, steps: int, workers: int = 1, threads: int = 1, file: Path | None = None, rows: list[str] | None = None
) -> None:
    """Compare and print: a table with a line a row, each row's verdict, where our steps' time goes, and a line of JSON.

    batch: pairs a step; steps: timed steps a side and round; workers: decoding processes; threads: OpenMP threads of each side;
    rows: of `step_rows.ROWS`; default: all. Raises ValueError when open_clip's environment cannot be set up and when a side fails, with
    its last lines.
    """
    asked = step_rows.chosen(rows or [])
    names = list(dict.fromkeys(name for row in asked for name in (row.other, row.side)))
    measured: dict[str, list[Timed]] = {name: [] for name in names}
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-bench-") as name:
        folder, env = Path(name), environment.set_up() if THEIRS in names else None
        material.check_workers(workers)
        shards = material.shards(environment.cache(), max(workers, material.shards_of(batch * (WARM_UP + steps + SPARE))))
        if batch > shards.samples:
            raise ValueError(f"--batch {batch}: the benchmark's shards hold {shards.samples} pairs; ask for less")
        weights = str(material.teacher_weights(environment.cache(), TEACHER))
        job = StepBenchmark(shards, {"model": TEACHER, "pretrained": weights}, {"model": STUDENT}, batch, steps, workers, threads)
        recipes = job.recipes(folder / "store")
        if "store" in names:
            side_by_side.embed(job.recipe(), folder / "store", folder, job.shards.samples, job.threads)
        quality: Agreement | None = None
        if "int8" in names:
            quality, product = teacher_quality.on_first_batch(recipes["int8"])
            print(f"8 bit beside float32, products by {product}: {quality}", flush=True)
        for number in range(rounds):
            turn = number % len(names)  # who goes first changes from round to round
            for side in names[turn:] + names[:turn]:
                place = folder / f"{side}-{number}"
                if side == THEIRS:
                    assert env is not None
                    measured[side].append(measure_theirs(job, env.python, place))
                else:
                    measured[side].append(measure_ours(job, place, recipes[side]))
            print(f"round {number + 1}/{rounds}, processor seconds a step: {_latest(measured)}", flush=True)
    outcomes = [step_rows.outcome(row, measured, quality if row.side == "int8" else None) for row in asked]
    versions = {} if env is None else env.versions
    _report(outcomes, measured, job, comparison.conditions(versions, threads), file)


def fastest_product() -> str:
    """Of int8 on this machine's CPU: with VNNI the one that a recipe takes by itself, else oneDNN's."""
    return "auto" if matmul.choose(torch.device("cpu")) == "int_mm" else "onednn"


def measure_ours(job: StepBenchmark, folder: Path, recipe: dict[str, Any] | None = None) -> Timed:
    """The timed steps of megakd/train.py; recipe: default: the job's own."""
    content = recipe or job.recipe()
    warm_up = COMPILING if content["student"].get("compile") else WARM_UP
    with side_by_side.training(content, folder, job.threads) as child:
        return timed(child, lambda: our_steps(folder / "run"), job.steps, job.batch, warm_up)


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


def _latest(measured: dict[str, list[Timed]]) -> str:
    return ", ".join(f"{side} {done[-1].processor_seconds:.2f}" for side, done in measured.items())


def _report(
    outcomes: list[step_rows.Outcome], measured: dict[str, list[Timed]], job: StepBenchmark, where: dict[str, Any], file: Path | None
) -> None:
    console = plain()
    console.print(step_rows.table(outcomes, measured))
    for found in outcomes:
        console.print(f"- {found.row.name}: {found.verdict}", markup=False)
    sides: dict[str, Any] = {}
    for name, done in measured.items():
        steps = [step for each in done for step in each.steps]
        parts = {part: median(step.seconds.get(part, 0.0) for step in steps) for part in steps[0].seconds}
        sides[name] = {
            "images_per_second": [median(each.rates) for each in done],
            "processor_seconds": [each.processor_seconds for each in done],
            "seconds": parts,
        }
        if name != THEIRS:
            sides[name]["share_beside_towers"] = beside = share_beside_towers(steps)
            shown = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
            console.print(f"- {name}: {beside:.1%} of a step is neither of the models'; median seconds: {shown}", markup=False)
    for note in NOTES:
        console.print(f"- {note}", markup=False)
    comparison.say_where(where)
    settings = {
        "teacher": TEACHER, "student": STUDENT, "precision": "fp32", "batch": job.batch, "steps": job.steps, "warm_up": WARM_UP,
        "workers": job.workers, "pairs": job.shards.samples, "rounds": len(next(iter(measured.values()))),
    }  # fmt: skip
    made = {found.row.name: found.to_json() for found in outcomes}
    comparison.record({"benchmark": "bench step", "rows": made, "sides": sides, "settings": settings, **where}, file)
