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

import json
import math
from pathlib import Path
from typing import Any

import torch

from megakd.objectives.cost import LossShape
from megakd.objectives.set import ObjectiveSet
from megakd.planning import models, rates, report, zero
from megakd.planning.cluster import GB, IN_PIECES, OUTSIDE, Cluster
from megakd.planning.modes import STORE, Mode, PlannedJob, Row, modes, row
from megakd.planning.result import MemoryPlan
from megakd.recipe import Recipe
from megakd.runtime import ds_check, ds_config, precision, zero3


def run(
    recipe: Recipe,
    recipe_name: str,
    config: str | None,
    cluster: Cluster,
    *,
    teacher_zero: dict[str, Any] | None = None,
    file: Path | None = None,
) -> MemoryPlan:
    """Plan, print the table, and write JSON to `file`. config: path of the DeepSpeed JSON. Raises ValueError as `plan` does."""
    made = plan(recipe, recipe_name, config, cluster, teacher_zero=teacher_zero)
    report.show(made)
    if file is not None:
        file.write_text(json.dumps(made.to_json(), indent=2) + "\n", encoding="utf-8")
    return made


def plan(
    recipe: Recipe, recipe_name: str, config: str | None, cluster: Cluster, *, teacher_zero: dict[str, Any] | None = None
) -> MemoryPlan:
    """Everything known of the job without weights, data or a GPU; a decoder's vocabulary is its tokenizer's, which has to be there.

    teacher_zero: the DeepSpeed configuration of a partitioned teacher; None for the built-in one.
    Raises ValueError for what a run would refuse in its settings, and for an unknown model or GPU, with the nearest.
    """
    cluster.check()
    job = job_of(recipe, recipe_name, config, cluster, teacher_zero or zero3.settings())
    rows = [row(job, mode) for mode in modes(job)]
    recommended, why = recommend(rows, cluster)
    return MemoryPlan(job, cluster, rows, asked(recipe, rows), recommended, why)


def job_of(recipe: Recipe, recipe_name: str, config: str | None, cluster: Cluster, teacher_zero: dict[str, Any]) -> PlannedJob:
    device = torch.device("cpu" if cluster.kind == "cpu" else "cuda")
    raw, config_name = ds_config.read(config, precision.of(device))
    resolved = ds_config.resolve(raw, recipe, cluster.gpus, config_name=config_name, recipe_name=recipe_name)
    ds_check.check(resolved, config_name)
    rounds, pairs = resolved.micro_batches, recipe.optim.batch if recipe.objectives.active() else 0
    questions = recipe.questions_in_a_step()
    local, asked = pairs // cluster.gpus, math.ceil(questions / cluster.gpus)
    shares = models.Shares(local // rounds, local, math.ceil(asked / rounds), asked)
    task = ObjectiveSet(recipe, device, None)
    student_zero, teacher_settings = (
        zero.Settings.of(resolved, precision.dtype(resolved.precision).itemsize),
        zero.Settings.of(teacher_zero, precision.dtype(precision.of(device)).itemsize),
    )
    taught = recipe.teachers().values() if task.needs_teacher else ()
    teachers = tuple(models.teacher(settings, shares.micro, local, precision.of(device), teacher_settings, device) for settings in taught)
    widths = [teacher.width for teacher in teachers]
    student = models.student(
        recipe, lambda own: task.heads(own, widths), shares, bf16=resolved.precision == "bf16", drop=student_zero.stage > 1
    )
    elements = (student.element, teacher_settings.element)
    shape = LossShape(pairs, cluster.gpus, (student.width, sum(widths)), elements, len(teachers), recipe.kernels.ring, device)
    return PlannedJob(
        student, teachers, task.cost(shape), task.backends, student_zero, teacher_settings,
        pairs, cluster.gpus, questions, rounds, rates.gpu(cluster.kind), cluster.per_node,
    )  # fmt: skip


def asked(recipe: Recipe, rows: list[Row]) -> str:
    """The name of the row that the recipe's `[teacher]` asks for."""
    teacher = recipe.teacher
    if teacher is None or len(rows) == 1:
        return rows[0].mode.name
    if teacher.store is not None:
        return STORE
    wanted = (teacher.placement, teacher.int8, teacher.offload, True)
    return next(row.mode.name for row in rows if (row.mode.placement, row.mode.int8, row.mode.offload, row.mode.text) == wanted)


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


__all__ = ["Cluster", "MemoryPlan", "Mode", "PlannedJob", "job_of", "plan", "recommend", "run"]
