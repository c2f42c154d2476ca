"""`--keep_projection`: the heads that a run has trained beside its towers, which project into its teachers' spaces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megakd.export import clip_folder
from megakd.objectives.base import head_name
from megakd.recipe import Recipe


def described(recipe: Recipe, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What is known of each head without its teacher: its objective, the teacher that it was trained against, and its tensors' shapes.

    Empty where the run has no head.
    """
    known: dict[str, dict[str, Any]] = {}
    teachers = list(recipe.weighted_teachers().items())
    for name, value in clip_folder.head_weights(weights).items():
        head, _, parameter = name.partition(".")
        if head not in known:
            objective, place = _objective(recipe, head, len(teachers))
            known[head] = {"objective": objective, "shapes": {}}
            if place is not None and place < len(teachers):
                role, teacher = teachers[place]
                known[head] |= {"teacher": role, "teacher_model": teacher.model, "teacher_pretrained": teacher.pretrained}
        known[head]["shapes"][parameter] = list(value.shape)
    return known


def _objective(recipe: Recipe, head: str, teachers: int) -> tuple[str, int | None]:
    """The objective of a head, and the place among the teachers that it has by its name; None where several teachers leave that open."""
    for objective in recipe.active():
        for place in range(max(teachers, 1)):
            if head_name(objective, place) == head:
                # An objective that reads texts leaves out teachers without them, and counts the others alone.
                return objective, place if teachers == 1 else None
    return head, None


def lines(recipe: Recipe | None, weights: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Write the heads into `folder`, and say which. Raises ValueError where there is none."""
    found = {} if recipe is None else described(recipe, weights)
    if not found:
        raise ValueError("--keep_projection: there is no head; it is for runs whose objectives project into a teacher's space: take it out")
    clip_folder.write_heads(folder, weights, found)
    names = ", ".join(f"{name} of {one.get('teacher_model') or 'its teachers'}" for name, one in found.items())
    return [f"{clip_folder.HEADS_FILE} has the heads {names}: HEAD.PARAMETER, described in the file's metadata"]
