"""`feature`: the projected student embedding learns to point where the teacher's does. `masked_feature`: also from a part of the image."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from megakd.models.heads import Head, ModelShape, head_between
from megakd.models.masking import Masked
from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, head_name
from megakd.objectives.cost import LossCost, LossShape
from megakd.recipe import Recipe


class Feature(Objective):
    """Mean over the batch and the teacher's modalities of |projected student - teacher|^2, both of unit length: 2 - 2 cosine.

    A teacher that sees images alone has one modality, whose mean is not halved.

    The square is summed over the width, not averaged: a mean over D would divide the loss's weight by D (CLIP-KD compensates
    with a weight of 2000 at one width). Source: FD of CLIP-KD (arXiv 2307.12732), in that form.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        self._kind, self.reads_text, self.of_pairs = recipe.feature.head, True, names

    def head(self, student: ModelShape, teacher: ModelShape) -> Head:
        return head_between(f"{self.names[0]}.head", self._kind, student, teacher)

    def cost(self, shape: LossShape) -> LossCost:
        return cost.rowwise(shape)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        (name,), distances = self.names, []
        for place, teacher in enumerate(context.teachers):
            image_BD, text_BD = context.student.projected[head_name(name, place)]
            distance = _square_distances(image_BD, teacher.image).mean()
            distances.append((distance + _square_distances(text_BD, teacher.text).mean()) / 2 if teacher.has_text else distance)
        return {name: context.mean(distances)}

    def pairs(self, context: StepContext) -> dict[str, Tensor]:
        (name,), distances = self.names, []
        for place, teacher in enumerate(context.teachers):
            image_BD, text_BD = context.student.projected[head_name(name, place)]
            distance_B = _square_distances(image_BD, teacher.image)
            distances.append((distance_B + _square_distances(text_BD, teacher.text)) / 2 if teacher.has_text else distance_B)
        return {name: context.mean_of_pairs(distances)}


@final
class MaskedFeature(Feature):
    """The same, where the student's image embedding is of a randomly masked image, the teacher's of the whole one. Texts are not masked.

    The tower embeds the masked images in a further forward; other objectives see whole ones. In the authors' code the masked embedding is
    overwritten by that of the whole image, so that it trains on `feature`. Source: MFD of CLIP-KD (arXiv 2307.12732).
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        self._kind, self._view = recipe.masked_feature.head, Masked(recipe.masked_feature.ratio)

    def head(self, student: ModelShape, teacher: ModelShape) -> Head:
        head = super().head(student, teacher)
        head.view = self._view
        return head


def _square_distances(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """(B,)"""
    return (a_BD.float() - b_BD.float()).square().sum(dim=-1)
