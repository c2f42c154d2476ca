"""`megakd plan`: what a job will need before it queues: memory a GPU, traffic, FLOPs and time, for each way to hold the teacher.

1. The DeepSpeed JSON is resolved against the recipe, as a run would.
2. Teacher, student and decoder are built on `meta` and watched through a step: activations, temporaries, FLOPs (`planning.models`).
3. DeepSpeed's share comes from formulas that a test counts again on real engines (`planning.zero`), the losses' from `objectives.cost`.
4. Each teacher mode adds its weights, gathered blocks and temporaries; the peak is that of the worst place in the step.
5. What fits and is fastest is recommended.

Times rest on the makers' peaks and assumed efficiencies (`planning.rates`); memory is exact but for allocators and workspaces.
Legend: W ranks, N pairs of a step, B of a micro-batch. GB are 1e9 bytes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megakd.models.heads import ModelShape, ObjectiveHead
from megakd.models.patches import Weights
from megakd.objectives.cost import FP32, LossShape
from megakd.objectives.set import ObjectiveSet
from megakd.planning import models, rates, vlm, zero
from megakd.planning.cluster import GB, IN_PIECES, OUTSIDE, Cluster
from megakd.planning.modes import STORE, PlannedJob, Row, modes, row
from megakd.recipe import Recipe, chain
from megakd.recipe.sources import shares_in_words
from megakd.runtime import ds_check, ds_config, precision, zero3
from megakd.teachers.build import patch_store


@dataclass(frozen=True)
class MemoryPlan:
    """A row a teacher mode. asked: the recipe's own mode. recommended: a mode's name, or None where nothing fits; why: a sentence.

    stored: what a million pairs take of a disk in a store with patch tokens, in words; None where the recipe asks for none.
    mixed: what each batch has of the sources of pairs and of questions, in words, where they have names and weights.
    beside: what a teacher takes that diagnostics load beside its store, in words; None where none does.
    """

    job: PlannedJob
    cluster: Cluster
    rows: list[Row]
    asked: str
    recommended: str | None
    why: str
    stored: str | None
    beside: str | None
    mixed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {**asdict(one), "mode": one.mode.name, "wire": one.wire, "bytes": one.bytes, "fits": one.fits(self.cluster.usable)}
            for one in self.rows
        ]
        assumptions = {
            name: getattr(rates, name) for name in dir(rates) if name.endswith(("_SHARE", "_SPEEDUP", "HOST_LINK", "HOST_MEMORY"))
        }
        return {
            "cluster": {**asdict(self.cluster), "usable_bytes": self.cluster.usable}, "job": asdict(self.job), "modes": rows,
            "asked": self.asked, "recommended": self.recommended, "why": self.why, "stored": self.stored, "beside": self.beside,
            "mixed": self.mixed,
            "assumptions": assumptions,
        }  # fmt: skip


def plan(recipe: Recipe, recipe_name: str, config: str | None, cluster: Cluster) -> MemoryPlan:
    """Everything known of the job without weights, data or a GPU; a decoder's vocabulary is its tokenizer's, which has to be there.

    config: path of the student's DeepSpeed JSON. A partitioned teacher's is the recipe's `teacher.ds_config`, or the built-in one.
    Raises ValueError for what a run would refuse in its settings, and for an unknown model or GPU, with the nearest.
    """
    cluster.check()
    job = job_of(recipe, recipe_name, config, cluster)
    rows = [row(job, mode) for mode in modes(job)]
    recommended, why = recommend(rows, cluster)
    settings = recipe.weighted_teachers().get("teacher") if job.teachers else None
    layout = None if settings is None else patch_store(recipe, models.describe(settings, "teacher"), 10**6)
    mode = asked(recipe, rows)
    stored = None if layout is None else str(layout)
    beside = _beside_store(recipe, rows) if mode == STORE else None
    return MemoryPlan(job, cluster, rows, mode, recommended, why, stored, beside, _mixed(recipe))


def _mixed(recipe: Recipe) -> tuple[str, ...]:
    pairs = {name: one.weight for name, one in recipe.data.train.items()} if isinstance(recipe.data.train, dict) else {}
    asked = {} if recipe.answers is None else {name: one.weight for name, one in recipe.answers.train.items()}
    of_pairs = (shares_in_words("data.train", pairs),) if pairs and recipe.active() else ()
    return (*of_pairs, *((shares_in_words("answers.train", asked),) if any(asked.values()) else ()))


def job_of(recipe: Recipe, recipe_name: str, config: str | None, cluster: Cluster) -> PlannedJob:
    device = torch.device("cpu" if cluster.kind == "cpu" else "cuda")
    raw, config_name = ds_config.read(config, precision.of(device))
    resolved = ds_config.resolve(raw, recipe, cluster.gpus, config_name=config_name, recipe_name=recipe_name)
    ds_check.check(resolved, config_name)
    rounds, pairs = resolved.micro_batches, recipe.optim.batch if recipe.active() else 0
    questions = recipe.questions_in_a_step()
    local, asked = pairs // cluster.gpus, math.ceil(questions / cluster.gpus)
    shares = models.Shares(local // rounds, local, math.ceil(asked / rounds), asked)
    objectives = ObjectiveSet(recipe, device, None)
    student_zero = zero.Settings.of(resolved, precision.dtype(resolved.precision).itemsize)
    partitioned = zero3.settings(None if recipe.teacher is None else recipe.teacher.ds_config)
    teacher_settings = zero.Settings.of(partitioned, precision.dtype(precision.of(device)).itemsize)
    taught = recipe.weighted_teachers().values() if objectives.needs_teacher else ()
    heads: dict[str, ObjectiveHead] = {}
    shapes: list[ModelShape] = []
    if (student_settings := chain.with_text(recipe)) is not None:
        described = [models.describe(settings, role) for role, settings in recipe.weighted_teachers().items() if objectives.needs_teacher]
        shapes = objectives.shapes(models.describe(student_settings, "student"), described)
        with models.META:
            heads = objectives.heads(shapes[0], shapes[1:])
    captions = not shapes or objectives.reads_captions(shapes[1:])
    teachers = tuple(
        models.teacher(settings, shares.micro, local, precision.of(device), teacher_settings, device, objectives.teacher_blocks)
        for settings in taught
    )
    student = models.student(recipe, heads, shares, bf16=resolved.precision == "bf16", drop=student_zero.stage > 1, captions=captions)
    answer_teacher = None
    if recipe.answers is not None and recipe.answers.teacher is not None:
        kind = precision.of(device)
        answer_teacher = vlm.answer_teacher(recipe.answers, student.image_tokens, shares.asked, shares.asked_local, kind)
    widths = [teacher.width for teacher in teachers]
    elements = (student.element, teacher_settings.element)
    kept = tuple(
        sum(local * read.count * read.width * (FP32 if isinstance(what, Weights) else elements[1]) for what, read in shape.patches.items())
        for shape in shapes[1:]
    )
    shape = LossShape(
        pairs, cluster.gpus, (student.width, sum(widths)), elements, len(teachers), recipe.kernels.ring, device, tuple(shapes)
    )
    return PlannedJob(
        student, teachers, objectives.cost(shape), objectives.backends, student_zero, teacher_settings,
        pairs, cluster.gpus, questions, rounds, rates.gpu(cluster.kind), cluster.per_node, answer_teacher, kept, recipe.data.prefetch,
    )  # fmt: skip


def asked(recipe: Recipe, rows: list[Row]) -> str:
    """The name of the row that the recipe's `[teacher]` asks for."""
    teacher = recipe.teacher
    if teacher is None or len(rows) == 1:
        return rows[0].mode.name
    if teacher.store is not None and teacher.store_of == "all":
        return STORE
    wanted = (teacher.placement, teacher.int8, teacher.offload, teacher.store is None)
    return next(row.mode.name for row in rows if (row.mode.placement, row.mode.int8, row.mode.offload, row.mode.text) == wanted)


def _beside_store(recipe: Recipe, rows: list[Row]) -> str | None:
    teacher = recipe.teacher
    if teacher is None or not recipe.evaluation.diagnostics:
        return None
    wanted = (teacher.placement, teacher.int8, teacher.offload, True)
    live = next(row for row in rows if (row.mode.placement, row.mode.int8, row.mode.offload, row.mode.text) == wanted)
    running = live.parts["teacher gathered"] + live.parts["teacher activations"]
    return (
        f"evaluation.diagnostics: the teacher is loaded beside its store, {live.mode.name}: {live.parts['teacher weights'] / GB:.2f} GB of "
        f"each GPU more than {STORE}, and {running / GB:.2f} GB while it runs, at evaluations alone"
    )


def recommend(rows: list[Row], cluster: Cluster) -> tuple[str | None, str]:
    """The fastest mode that fits, of those that need nothing prepared; of equal ones the first listed, which is the simplest."""
    fitting = [one for one in rows if one.fits(cluster.usable)]
    if not fitting:
        least = min(rows, key=lambda one: one.bytes)
        needed = (least.bytes / (1 - IN_PIECES) + OUTSIDE) / GB
        return None, (
            f"nothing fits: even {least.mode.name} needs a GPU of {needed:.1f} GB; lower train_micro_batch_size_per_gpu, set "
            f"student.activation_checkpointing, or raise the ZeRO stage"
        )
    ready = [one for one in fitting if not one.mode.prepared] or fitting
    best = min(ready, key=lambda one: (round(one.seconds.total, 4), rows.index(one)))
    smaller = [one.mode.name for one in rows if not one.mode.prepared and not one.fits(cluster.usable)]
    why = f"the fastest that fits, {best.bytes / GB:.1f} of {cluster.usable / GB:.1f} usable GB a GPU"
    if best.mode.prepared:
        why += ", after `megakd embed`: no mode with the whole teacher fits"
    elif smaller:
        why += f"; {', '.join(smaller)} would not fit"
    return best.mode.name, why
