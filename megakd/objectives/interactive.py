"""`interactive`, `cross`, `augmented_feature`: the student meets the teacher's embeddings in one space, at a scale that may be its own.

In the first two its projected embeddings are queries among the teacher's of the other modality, in the last both models are fused into one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from megakd.models.embeddings import Embeddings
from megakd.models.heads import FusionHead, Head, ModelShape, head_between
from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, head_name, kernel_options
from megakd.objectives.cost import LossCost, LossShape
from megakd.objectives.lines import Matrix, agreed, between, divergence, match, of_pairs
from megakd.recipe import Recipe
from megakd.recipe.objectives import AugmentedFeature as FusedSettings
from megakd.recipe.objectives import Interactive as Settings
from megakd_kernels import contrastive, interactive_kd
from megakd_kernels.panels import chunk_rows
from megakd_kernels.similarity import similarity_kd


class _Scaled(Objective):
    """The cosines are multiplied by the student's logit scale, by the number that the key `scale` is, or by a scale that the head learns
    beside the student's, as in CLIP-KD's code; there it is the scale's logarithm that multiplies.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, names: tuple[str, ...], settings: Settings | FusedSettings, kernel: str
    ) -> None:
        super().__init__(recipe, device, names)
        assert recipe.student is not None, "a recipe with objectives has a student"
        self.scale, self._bound = settings.scale, recipe.student.max_scale
        self.options = kernel_options(recipe, kernel, device)
        self.backend, self.of_pairs = self.options["backend"], names

    @property
    def max_scale(self) -> float | None:
        """Of the head's own scale; None without one."""
        return self._bound if self.scale == "own" else None

    @property
    def scale_limit(self) -> float:
        """What no scale exceeds, for kernels; with room for the rounding of exp and of the products."""
        return 1.001 * (self.scale if isinstance(self.scale, int | float) else self._bound)

    def projected(self, student: Embeddings, place: int) -> Embeddings:
        """The student as the head for the teacher at `place` hands it over, with the scale."""
        head = head_name(self.names[0], place)
        image_BD, text_BD = student.projected[head]
        scale = student.scale
        if self.scale != "student":
            scale = student.features[f"{head}.scale"] if self.scale == "own" else scale.new_tensor(self.scale)
        return student._replace(image=image_BD, text=text_BD, scale=scale)

    def pairs(self, context: StepContext) -> dict[str, Tensor]:
        """By panels of the matrices, whatever the loss is computed by."""
        losses = []
        for place, teacher in enumerate(context.teachers):
            queries = self.projected(context.student, place)
            ranks, dtype = agreed(replace(context, student=queries, teachers=[teacher]))
            rows = len(queries.image)
            chunk = chunk_rows(rows, rows * ranks.world, dtype, queries.image.device)
            losses.append(self._of_pairs(queries, teacher, partial(between, ranks=ranks, dtype=dtype, chunk=chunk)))
        return {self.names[0]: context.mean_of_pairs(losses)}

    @abstractmethod
    def _of_pairs(self, queries: Embeddings, teacher: Embeddings, matrix: Callable[[Embeddings, Embeddings], Matrix]) -> Tensor:
        """(B,), of each pair its part of the loss; matrix: `between`, with the ranks and panels of this batch."""
        ...


class _AmongTeachers(_Scaled):
    """A head brings the student to the teacher's width."""

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...], settings: Settings, kernel: str) -> None:
        super().__init__(recipe, device, names, settings, kernel)
        self._kind = settings.head

    def head(self, student: ModelShape, teacher: ModelShape) -> Head:
        return head_between(f"{self.names[0]}.head", self._kind, student, teacher, self.max_scale)


@final
class Interactive(_AmongTeachers):
    """Interactive contrastive learning (ICL of CLIP-KD, arXiv 2307.12732), see `megakd_kernels.interactive_kd`."""

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names, recipe.interactive, "interactive_kd")

    def cost(self, shape: LossShape) -> LossCost:
        return cost.of_kernel(cost.INTERACTIVE, self.options["backend"], shape)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        losses = [
            interactive_kd(self.projected(context.student, place), teacher, group=context.group, **self.options)
            for place, teacher in enumerate(context.teachers)
        ]
        return {self.names[0]: context.mean(losses)}

    def _of_pairs(self, queries: Embeddings, teacher: Embeddings, matrix: Callable[[Embeddings, Embeddings], Matrix]) -> Tensor:
        return of_pairs(match, matrix(queries, teacher))


@final
class Cross(_AmongTeachers):
    """1 / 2N sum_i [KL(softmax_j(s_t <r_i, t_j>) || softmax_j(s <P u_i, t_j>)) + the same with images and texts exchanged].

    Both softmaxes are over the teacher's columns, as in `interactive`, whose labels are the teacher's distribution here. Nothing is learned
    of the columns, so a student that is its teacher has a loss of exactly 0. Source: cross-KD in the code of CLIP-KD (arXiv 2307.12732).
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names, recipe.cross, "similarity_kd")

    def cost(self, shape: LossShape) -> LossCost:
        """Two calls for each teacher; of each further one four matrices of eager wait for the backward, or what the kernel keeps."""
        backend, count = self.options["backend"], max(1, shape.teachers)
        width = shape.widths[1] // count
        alone = replace(shape, teachers=1, widths=(width, width))
        one = cost.of_kernel(cost.SOFTMAX_KD, backend, alone)
        each = 4 * cost.FP32 * shape.pairs**2 if backend in ("eager", "compiled") else cost.kept(cost.SOFTMAX_KD, backend, alone)
        return LossCost(one.memory + (2 * count - 1) * each, one.wire.times(2 * count), 2 * count * one.flops)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        losses = []
        for place, teacher in enumerate(context.teachers):
            queries = self.projected(context.student, place)
            exchanged = teacher._replace(image=teacher.text, text=teacher.image)
            ways = ((queries.image, teacher), (queries.text, exchanged))
            parts = [
                similarity_kd(
                    queries._replace(image=own, text=taught.text), taught, directions=(0.5, 0.0), group=context.group, **self.options
                )
                for own, taught in ways
            ]
            losses.append(parts[0].kd + parts[1].kd)
        return {self.names[0]: context.mean(losses)}

    def _of_pairs(self, queries: Embeddings, teacher: Embeddings, matrix: Callable[[Embeddings, Embeddings], Matrix]) -> Tensor:
        return of_pairs(divergence, matrix(queries, teacher), matrix(teacher, teacher))


@final
class AugmentedFeature(_Scaled):
    """InfoNCE of images and texts in each of which student and teacher are fused: F u_i = W [u_i; r_i] + b, of unit length.

    The fusion is trained, a map for each modality and teacher to the student's width. u_i is the student's own embedding; in the authors'
    code it is the projected one where the widths differ, which their map does not fit. Source: AFD of CLIP-KD (arXiv 2307.12732).
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names, recipe.augmented_feature, "contrastive")

    def head(self, student: ModelShape, teacher: ModelShape) -> FusionHead:
        return FusionHead(student.width, teacher.width, self.max_scale)

    def cost(self, shape: LossShape) -> LossCost:
        """A call for each teacher; of each further one two matrices of eager wait for the backward, or what the kernel keeps."""
        backend, count = self.options["backend"], max(1, shape.teachers)
        alone = replace(shape, teachers=1, widths=(shape.widths[0], 0))
        one = cost.of_kernel(cost.SOFTMAX_HARD, backend, alone)
        each = 2 * cost.FP32 * shape.pairs**2 if backend in ("eager", "compiled") else cost.kept(cost.SOFTMAX_HARD, backend, alone)
        return LossCost(one.memory + (count - 1) * each, one.wire.times(count), count * one.flops)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        fused = [self.projected(context.student, place) for place in range(len(context.teachers))]
        losses = [contrastive(one, scale_limit=self.scale_limit, group=context.group, **self.options) for one in fused]
        return {self.names[0]: context.mean(losses)}

    def _of_pairs(self, queries: Embeddings, teacher: Embeddings, matrix: Callable[[Embeddings, Embeddings], Matrix]) -> Tensor:
        return of_pairs(match, matrix(queries, queries))
