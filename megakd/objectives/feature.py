"""`feature`: the projected student embedding learns to point where the teacher's does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.models.student import Head
from megakd.objectives.base import head_name
from megakd.recipe import Recipe

FEATURE = "feature"


class Feature:
    """Mean over the batch and the two modalities of |projected student - teacher|^2, both of unit length: 2 - 2 cosine.

    The square is summed over the width, not averaged: a mean over D would divide the loss's weight by D (CLIP-KD compensates
    with a weight of 2000 at one width). Source: FD of CLIP-KD (arXiv 2307.12732), in that form.
    """

    names: tuple[str, ...] = (FEATURE,)
    backend: str | None = None

    def __init__(self, recipe: Recipe) -> None:
        self._kind = recipe.feature.head

    def head(self, student_width: int, teacher_width: int) -> nn.Module | None:
        return Head(self._kind, student_width, teacher_width)

    def __call__(self, student: Embeddings, teachers: Sequence[Embeddings], group: ProcessGroup | None) -> dict[str, Tensor]:
        distances = []
        for place, teacher in enumerate(teachers):
            image_BD, text_BD = student.projected[head_name(FEATURE, place)]
            distances.append((_square_distance(image_BD, teacher.image) + _square_distance(text_BD, teacher.text)) / 2)
        return {FEATURE: torch.stack(distances).mean()}


def _square_distance(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    return (a_BD.float() - b_BD.float()).square().sum(dim=-1).mean()


def feature(recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> list[Feature]:
    return [Feature(recipe)]
