"""`--dry_run`: what a run would do, shown and checked without training and without one weight loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping

from megakd.models import clip, compiled
from megakd.runtime.launch import World
from megakd.training import feed
from megakd.training.prepare import PreparedRun
from megakd.training.tasks.distill import PairData


def show(plan: PreparedRun, world: World) -> str:
    """The resolved recipe and DeepSpeed configuration, a line a section; then in a few lines what would run, on what data, and each
    model's shapes, computed on torch's meta device.

    Raises ValueError for what only shows when samples are decoded and shapes meet.
    """
    settings = plan.request.recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    parts = [
        f"recipe ({plan.request.recipe_name}), without defaults:\n{_indented(settings)}",
        f"DeepSpeed configuration ({plan.config_name}):\n{_indented(plan.config)}",
        f"run folder: {plan.request.out}",
        f"would run: {_outline(plan, world)}",
        *(f"scheduled: {line}" for line in plan.request.recipe.scheduled()),
        *([] if plan.start is None else plan.start.describe()),
        *plan.learning,
        *_compiled(plan, world),
        *feed.outline(plan.request.recipe, world),
    ]
    return "\n".join([*parts, *(line for task in plan.tasks for line in task.preview(world))])


def _compiled(plan: PreparedRun, world: World) -> list[str]:
    """What becomes of the keys `compile`, where they are set."""
    recipe, lines = plan.request.recipe, []
    pairs = next((task for task in plan.tasks if isinstance(task, PairData)), None)
    if plan.student is not None and recipe.student is not None and recipe.student.compile:
        reads = () if pairs is None else pairs.objectives.student_blocks
        lines.append(compiled.outline(clip.on_meta(plan.student).clip, "student", world, reads))
    if pairs is not None:
        for role, teacher in pairs.teachers.items():
            settings, reads = recipe.teachers()[role], pairs.objectives.teacher_blocks
            if settings.compile:
                model, texts = clip.on_meta(teacher).clip, settings.store_of == "all"
                lines.append(compiled.outline(model, role, world, reads, texts=texts))
    return lines


def _outline(plan: PreparedRun, world: World) -> str:
    recipe, config = plan.request.recipe, plan.config
    accumulation = f"{world.size} ranks x {config.micro_batches} x {config.micro_batch}"
    seen = recipe.optim.steps * recipe.samples_in_a_step()
    learned = "pairs" if recipe.active() else "questions"
    objectives = ", ".join(f"{weight:g} {name}" for name, weight in recipe.active().items()) or "answers"
    how = f"ZeRO {config.stage}, {config.precision}; {objectives}"
    return f"{recipe.optim.steps} steps of batch {recipe.optim.batch} = {accumulation}, {seen:,} {learned} in all; {how}"


def _indented(content: Mapping[str, object]) -> str:
    """One line a section: a page of braces would hide the lines that matter."""
    return "\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()) or "  {}"
