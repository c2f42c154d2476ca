"""The distillation task: a batch of image-text pairs -> one loss for each objective of the recipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.objectives.base import head_name
from megakd.objectives.registry import WITH_BIAS, WITHOUT_TEACHER, build
from megakd.recipe import Recipe


class ObjectiveSet:
    """The recipe's objectives with a positive weight, ready to be called on embeddings."""

    def __init__(self, recipe: Recipe, device: torch.device, group: ProcessGroup | None) -> None:
        """group: the ranks whose pairs form one batch; None is this process alone.

        Raises ValueError when an objective needs a teacher and the recipe has no `[teacher]`, and for a backend that cannot run.
        """
        self.weights = recipe.objectives.active()
        self.needs_teacher = self.uses_teacher(recipe)
        if self.needs_teacher and recipe.teacher is None:
            needy = [name for name in self.weights if name not in WITHOUT_TEACHER]
            raise ValueError(
                f"objectives.{', objectives.'.join(needy)}: needs a teacher, and the recipe has no [teacher]; "
                f"add one or set the weight to 0"
            )
        self._objectives = build(recipe, device)
        self._group = group
        self.backends = {name: part.backend for part in self._objectives for name in part.names if part.backend is not None}

    @staticmethod
    def uses_teacher(recipe: Recipe) -> bool:
        return not WITHOUT_TEACHER.issuperset(recipe.objectives.active())

    def check_bias(self, model: str, has_bias: bool) -> None:
        """Raises ValueError when an objective needs the logit bias of a sigmoid-trained model that `model` has not."""
        needy = sorted(WITH_BIAS.intersection(self.weights))
        if needy and not has_bias:
            raise ValueError(
                f"objectives.{needy[0]}: the {model} has no logit bias, so every pair would count as a match; use a model trained "
                f"with a sigmoid loss, or give a {model}.architecture of your own `init_logit_bias` (SigLIP starts at -10)"
            )

    def heads(self, student_width: int, teacher_widths: Sequence[int]) -> dict[str, nn.Module]:
        """The projections that the objectives train, one for each teacher, by name. They go into the engine with the student."""
        built = {
            head_name(part.names[0], place): part.head(student_width, width)
            for part in self._objectives
            for place, width in enumerate(teacher_widths)
        }
        return {name: head for name, head in built.items() if head is not None}

    def losses(self, student: Embeddings, teachers: Sequence[Embeddings]) -> dict[str, Tensor]:
        """Unweighted float32 scalars by objective name, in the order of `weights`."""
        found: dict[str, Tensor] = {}
        for objective in self._objectives:
            found |= objective(student, teachers, self._group)
        return {name: found[name] for name in self.weights}
