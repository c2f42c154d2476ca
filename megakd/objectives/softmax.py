"""`contrastive` and `similarity`: losses on the softmaxes over the rows and columns of the similarity matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.objectives.base import kernel_options
from megakd.recipe import Recipe
from megakd_kernels import Pair, similarity_kd

CONTRASTIVE, SIMILARITY = "contrastive", "similarity"


class Softmax:
    """contrastive: InfoNCE, CLIP's own loss (arXiv 2103.00020). similarity: KL(teacher || student), see `megakd_kernels.similarity_kd`.

    The student's logit scale is its learned one, or the recipe's `similarity.student_scale`, which then gets no gradient from here.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...], fixed_scale: float | None = None) -> None:
        self.names = names
        assert recipe.student is not None, "a recipe with objectives has a student"
        self._temperature, self._fixed_scale, self._max_scale = recipe.similarity.temperature, fixed_scale, recipe.student.max_scale
        self._options = kernel_options(recipe, "similarity_kd" if SIMILARITY in names else "contrastive", device)
        self.backend: str | None = self._options["backend"]
        self._scale_limit: float | None = None

    def head(self, student_width: int, teacher_width: int) -> nn.Module | None:
        return None

    def __call__(self, student: Embeddings, teachers: Sequence[Embeddings], group: ProcessGroup | None) -> dict[str, Tensor]:
        guides: list[Pair] = list(teachers) if SIMILARITY in self.names else []
        if self._scale_limit is None:  # once: teachers are frozen, and reading a scale waits for the device
            scales = [self._fixed_scale or self._max_scale, *(float(guide.scale) for guide in guides)]
            self._scale_limit = 1.001 * max(scales)  # for the rounding of exp and of the products
        if self._fixed_scale is not None:
            student = student._replace(scale=student.scale.new_tensor(self._fixed_scale))
        loss = similarity_kd(
            student,
            guides or None,
            temperature=self._temperature,
            hard=CONTRASTIVE in self.names,
            scale_limit=self._scale_limit,
            group=group,
            **self._options,
        )
        return {name: {SIMILARITY: loss.kd, CONTRASTIVE: loss.hard}[name] for name in self.names}


def softmax(recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> list[Softmax]:
    """One objective where both losses see the same student logits: one pass then yields both."""
    fixed = recipe.similarity.student_scale
    if fixed is None:
        return [Softmax(recipe, device, names)]
    return [Softmax(recipe, device, (name,), fixed if name == SIMILARITY else None) for name in names]
