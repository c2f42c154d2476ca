"""`sigmoid_contrastive` and `sigmoid_similarity`: losses on every pair of the similarity matrix by itself, for SigLIP's family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megakd.models.embeddings import Embeddings
from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, kernel_options
from megakd.objectives.cost import LossCost, LossShape
from megakd.objectives.lines import Lines, matrices, of_pairs
from megakd.recipe import Recipe
from megakd_kernels import SimilarityLoss, sigmoid_kd

CONTRASTIVE, SIMILARITY = "sigmoid_contrastive", "sigmoid_similarity"
_COSTS = {(CONTRASTIVE,): cost.SIGMOID_HARD, (SIMILARITY,): cost.SIGMOID_KD, (CONTRASTIVE, SIMILARITY): cost.SIGMOID_BOTH}


@final
class Sigmoid(Objective):
    """sigmoid_contrastive: SigLIP's own loss (arXiv 2303.15343). sigmoid_similarity: the teacher's probabilities in place of its labels.

    See `megakd_kernels.sigmoid_kd`. Both models bring a learned bias besides the scale.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        self.of_pairs = names
        self._options = kernel_options(recipe, "sigmoid_kd", device)
        self.backend = self._options["backend"]
        self._weighs_alike = recipe.weighs_teachers_alike()

    def cost(self, shape: LossShape) -> LossCost:
        counted = cost.of_kernel if self._weighs_alike or SIMILARITY not in self.names else cost.one_by_one
        return counted(_COSTS[self.names], self._options["backend"], shape)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        def loss_of(teachers: Sequence[Embeddings], hard: bool) -> SimilarityLoss:
            return sigmoid_kd(context.student, [*teachers] or None, hard=hard, group=context.group, **self._options)

        loss = context.kd(context.teachers if SIMILARITY in self.names else (), loss_of, CONTRASTIVE in self.names)
        return {name: {SIMILARITY: loss.kd, CONTRASTIVE: loss.hard}[name] for name in self.names}

    def pairs(self, context: StepContext) -> dict[str, Tensor]:
        """Of its row and of its column half each: an entry of the matrix belongs to two pairs."""
        teachers = list(context.teachers) if SIMILARITY in self.names else []
        own, taught = matrices(replace(context, teachers=teachers), whole=False)

        def biased(lines: Lines, part: slice, bias: Tensor | None) -> Tensor:
            return lines.logits(part) if bias is None else lines.logits(part) + bias.to(lines.own_BD.dtype)

        def match(lines: Lines, part: slice) -> Tensor:
            logits_cN = biased(lines, part, context.student.bias)
            signs_cN = torch.full_like(logits_cN, -1).scatter(1, lines.positives(part), 1)
            return -logsigmoid(signs_cN * logits_cN).sum(1)

        def divergence(bias: Tensor | None, lines: Lines, of_teacher: Lines, part: slice) -> Tensor:
            own_cN, other_cN = biased(lines, part, context.student.bias), biased(of_teacher, part, bias)
            yes_cN, no_cN = logsigmoid(other_cN) - logsigmoid(own_cN), logsigmoid(-other_cN) - logsigmoid(-own_cN)
            return (other_cN.sigmoid() * yes_cN + (-other_cN).sigmoid() * no_cN).sum(1)

        found = {CONTRASTIVE: of_pairs(match, own)} if CONTRASTIVE in self.names else {}
        if SIMILARITY in self.names:
            each = [of_pairs(partial(divergence, one.bias), own, matrix) for one, matrix in zip(teachers, taught, strict=True)]
            found[SIMILARITY] = context.mean_of_pairs(each)
        return found
