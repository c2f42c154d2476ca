"""The distillation task: a batch of image-text pairs -> one loss for each objective of the recipe."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.objectives.registry import REGISTRY
from megakd.recipe import Recipe


class Distill:
    """The recipe's objectives with a positive weight, ready to be called on embeddings."""

    def __init__(self, recipe: Recipe, group: ProcessGroup | None) -> None:
        """group: the ranks whose pairs form one batch; None is this process alone.

        Raises ValueError when an objective needs a teacher and the recipe has no `[teacher]`.
        """
        self.weights = recipe.objectives.active()
        self._objectives = {name: REGISTRY[name](recipe) for name in self.weights}
        self._group = group
        self.needs_teacher = self.uses_teacher(recipe)
        if self.needs_teacher and recipe.teacher is None:
            needy = [name for name, objective in self._objectives.items() if objective.needs_teacher]
            raise ValueError(
                f"objectives.{', objectives.'.join(needy)}: needs a teacher, and the recipe has no [teacher]; "
                f"add one or set the weight to 0"
            )

    @staticmethod
    def uses_teacher(recipe: Recipe) -> bool:
        return any(REGISTRY[name](recipe).needs_teacher for name in recipe.objectives.active())

    def heads(self, student_width: int, teacher_width: int | None) -> dict[str, nn.Module]:
        """The projections that the objectives train, by name. They go into the engine with the student."""
        if teacher_width is None:
            return {}
        built = {name: objective.head(student_width, teacher_width) for name, objective in self._objectives.items()}
        return {name: head for name, head in built.items() if head is not None}

    def losses(self, student: Embeddings, teacher: Embeddings | None) -> dict[str, Tensor]:
        """Unweighted float32 scalars by objective name."""
        return {name: objective(student, teacher, self._group) for name, objective in self._objectives.items()}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        assert isinstance(total, Tensor)
        return total
