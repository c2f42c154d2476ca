"""`sigmoid_contrastive` and `sigmoid_similarity`: losses on every pair of the similarity matrix by itself, for SigLIP's family."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, kernel_options
from megakd.objectives.cost import LossCost, LossShape
from megakd.recipe import Recipe
from megakd_kernels import BiasedPair, sigmoid_kd

CONTRASTIVE, SIMILARITY = "sigmoid_contrastive", "sigmoid_similarity"
_COSTS = {(CONTRASTIVE,): cost.SIGMOID_HARD, (SIMILARITY,): cost.SIGMOID_KD, (CONTRASTIVE, SIMILARITY): cost.SIGMOID_BOTH}


@final
class Sigmoid(Objective):
    """sigmoid_contrastive: SigLIP's own loss (arXiv 2303.15343). sigmoid_similarity: the teacher's probabilities in place of its labels.

    See `megakd_kernels.sigmoid_kd`. Both models bring a learned bias besides the scale.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        self._options = kernel_options(recipe, "sigmoid_kd", device)
        self.backend = self._options["backend"]

    def cost(self, shape: LossShape) -> LossCost:
        return cost.of_kernel(_COSTS[self.names], self._options["backend"], shape)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        teachers: list[BiasedPair] = list(context.teachers) if SIMILARITY in self.names else []
        loss = sigmoid_kd(context.student, teachers or None, hard=CONTRASTIVE in self.names, group=context.group, **self._options)
        return {name: {SIMILARITY: loss.kd, CONTRASTIVE: loss.hard}[name] for name in self.names}
