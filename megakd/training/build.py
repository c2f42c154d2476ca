"""From a plan to what is trained: one module with the parts of all tasks, what of it learns and how fast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from megakd.models import casts, clip, compiled
from megakd.models.places import freeze
from megakd.models.student import Student
from megakd.models.vlm.student import freeze_all_but
from megakd.runtime import zero3
from megakd.runtime.launch import World
from megakd.training.learning import paces
from megakd.training.optim import parameter_groups
from megakd.training.prepare import PreparedRun
from megakd.training.tasks.base import Task


def build_learners(
    plan: PreparedRun, tasks: Sequence[Task], world: World, say: Callable[[str], None], have: Collection[str] = ()
) -> tuple[Student, list[dict[str, object]]]:
    """The module for the engine, with all that is trained, and its AdamW parameter groups. A collective.

    Weights are loaded, or drawn from torch's generator; on the CPU but for a quantised language model's. say: where it is told
    what was compiled. have: names of the checkpoint's tensors that the engine will load: what the student begins with is not read for them.
    """
    recipe, towers = plan.request.recipe, nn.Module()
    module = Student(None, {}, 1.0)
    if plan.student is not None and recipe.student is not None:
        towers = clip.build(plan.student, torch.device("cpu")).clip
        if plan.start is not None:
            plan.start.load(towers, have, world)
        if recipe.student.activation_checkpointing:
            towers.set_grad_checkpointing(True)  # type: ignore[operator]
        module = Student(towers, {}, recipe.student.max_scale)
    student = module
    for task in tasks:
        module = task.extend(module, world.device)
    freeze_all_but(module, *(prefix for task in tasks for prefix in task.learns))
    if recipe.student is not None:
        freeze(module, recipe.student.freeze)
    if plan.config.precision == "bf16":
        casts.for_engine(towers)
    for task in tasks:
        task.keep_replica()  # which no one compiles: an evaluation's batches are of other sizes
    if recipe.student is not None and recipe.student.compile:
        reads = [read for head in student.heads.values() for read in head.blocks]
        line, blocks = compiled.compile_towers(towers, "student", world, reads)
        say(line)
        if plan.config.stage == 3:
            zero3.gather_whole(blocks)
    rates = {prefix: rate for task in tasks for prefix, rate in task.rates.items()}
    return module, parameter_groups(module, paces(module, recipe.optim, rates))
