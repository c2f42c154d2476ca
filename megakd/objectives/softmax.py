"""`contrastive` and `similarity`: losses on the softmaxes over the rows and columns of the similarity matrix."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, kernel_options
from megakd.objectives.cost import LossCost, LossShape
from megakd.recipe import Recipe
from megakd_kernels.similarity import Pair, similarity_kd

CONTRASTIVE, SIMILARITY = "contrastive", "similarity"


@final
class Softmax(Objective):
    """contrastive: InfoNCE, CLIP's own loss (arXiv 2103.00020). similarity: KL(teacher || student), see `megakd_kernels.similarity_kd`.

    The student's logit scale is its learned one, or the recipe's `similarity.student_scale`, which then gets no gradient from here.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        assert recipe.student is not None, "a recipe with objectives has a student"
        self._temperature, self._max_scale = recipe.similarity.temperature, recipe.student.max_scale
        self._fixed_scale = recipe.similarity.student_scale if SIMILARITY in names else None
        self._options = kernel_options(recipe, "similarity_kd" if SIMILARITY in names else "contrastive", device)
        self.backend = self._options["backend"]
        self._scale_limit: float | None = None

    @classmethod
    def shared(cls, recipe: Recipe, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Both together, where they see the same student logits: one pass then yields both."""
        return [names] if recipe.similarity.student_scale is None else [(name,) for name in names]

    def cost(self, shape: LossShape) -> LossCost:
        return cost.of_kernel(cost.SOFTMAX_KD if SIMILARITY in self.names else cost.SOFTMAX_HARD, self._options["backend"], shape)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        student = context.student
        teachers: list[Pair] = list(context.teachers) if SIMILARITY in self.names else []
        if self._scale_limit is None:  # once: teachers are frozen, and reading a scale waits for the device
            scales = [self._fixed_scale or self._max_scale, *(float(teacher.scale) for teacher in teachers)]
            self._scale_limit = 1.001 * max(scales)  # for the rounding of exp and of the products
        if self._fixed_scale is not None:
            student = student._replace(scale=student.scale.new_tensor(self._fixed_scale))
        loss = similarity_kd(
            student,
            teachers or None,
            temperature=self._temperature,
            hard=CONTRASTIVE in self.names,
            scale_limit=self._scale_limit,
            group=context.group,
            **self._options,
        )
        return {name: {SIMILARITY: loss.kd, CONTRASTIVE: loss.hard}[name] for name in self.names}
