"""`sigmoid_contrastive` and `sigmoid_similarity`: losses on every pair of the similarity matrix by itself, for SigLIP's family."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.objectives.base import kernel_options
from megakd.recipe import Recipe
from megakd_kernels import BiasedPair, sigmoid_kd

CONTRASTIVE, SIMILARITY = "sigmoid_contrastive", "sigmoid_similarity"


class Sigmoid:
    """sigmoid_contrastive: SigLIP's own loss (arXiv 2303.15343). sigmoid_similarity: the teacher's probabilities in place of its labels.

    See `megakd_kernels.sigmoid_kd`. Both models bring a learned bias besides the scale.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        self.names = names
        self._options = kernel_options(recipe, "sigmoid_kd", device)
        self.backend: str | None = self._options["backend"]

    def head(self, student_width: int, teacher_width: int) -> nn.Module | None:
        return None

    def __call__(self, student: Embeddings, teachers: Sequence[Embeddings], group: ProcessGroup | None) -> dict[str, Tensor]:
        guides: list[BiasedPair] = list(teachers) if SIMILARITY in self.names else []
        loss = sigmoid_kd(student, guides or None, hard=CONTRASTIVE in self.names, group=group, **self._options)
        return {name: {SIMILARITY: loss.kd, CONTRASTIVE: loss.hard}[name] for name in self.names}


def sigmoid(recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> list[Sigmoid]:
    return [Sigmoid(recipe, device, names)]
