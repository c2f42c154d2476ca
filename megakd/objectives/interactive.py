"""`interactive` and `cross`: the student's projected embeddings as queries among the teacher's embeddings of the other modality."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from megakd.models.embeddings import Embeddings
from megakd.models.heads import Head, ModelShape, head_between
from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, head_name, kernel_options
from megakd.objectives.cost import LossCost, LossShape
from megakd.recipe import Recipe
from megakd.recipe.objectives import Interactive as Settings
from megakd_kernels import interactive_kd
from megakd_kernels.similarity import similarity_kd


class _AmongTeachers(Objective):
    """A head brings the student to the teacher's width. Its cosines with the teacher's are multiplied by the student's logit scale, by the
    number that the key `scale` is, or by a scale that the head learns beside the student's, as in CLIP-KD's code; there it is the scale's
    logarithm that multiplies.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...], settings: Settings, kernel: str) -> None:
        super().__init__(recipe, device, names)
        assert recipe.student is not None, "a recipe with objectives has a student"
        self._kind, self._scale = settings.head, settings.scale
        self._max_scale = recipe.student.max_scale if self._scale == "own" else None
        self._options = kernel_options(recipe, kernel, device)
        self.backend = self._options["backend"]

    def head(self, student: ModelShape, teacher: ModelShape) -> Head:
        return head_between(f"{self.names[0]}.head", self._kind, student, teacher, self._max_scale)

    def queries(self, student: Embeddings, place: int) -> Embeddings:
        """The student in the space of the teacher at `place`."""
        head = head_name(self.names[0], place)
        image_BD, text_BD = student.projected[head]
        scale = student.scale
        if self._scale != "student":
            scale = student.features[f"{head}.scale"] if self._scale == "own" else scale.new_tensor(self._scale)
        return student._replace(image=image_BD, text=text_BD, scale=scale)


@final
class Interactive(_AmongTeachers):
    """Interactive contrastive learning (ICL of CLIP-KD, arXiv 2307.12732), see `megakd_kernels.interactive_kd`."""

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names, recipe.interactive, "interactive_kd")

    def cost(self, shape: LossShape) -> LossCost:
        return cost.of_kernel(cost.INTERACTIVE, self._options["backend"], shape)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        losses = [
            interactive_kd(self.queries(context.student, place), teacher, group=context.group, **self._options)
            for place, teacher in enumerate(context.teachers)
        ]
        return {self.names[0]: context.mean(losses)}


@final
class Cross(_AmongTeachers):
    """1 / 2N sum_i [KL(softmax_j(s_t <r_i, t_j>) || softmax_j(s <P u_i, t_j>)) + the same with images and texts exchanged].

    Both softmaxes are over the teacher's columns, as in `interactive`, whose labels are the teacher's distribution here. Nothing is learned
    of the columns, so a student that is its teacher has a loss of exactly 0. Source: cross-KD in the code of CLIP-KD (arXiv 2307.12732).
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names, recipe.cross, "similarity_kd")

    def cost(self, shape: LossShape) -> LossCost:
        """Two calls for each teacher; of eager four matrices of each further one wait for the backward."""
        backend, count = self._options["backend"], max(1, shape.teachers)
        width = shape.widths[1] // count
        one = cost.of_kernel(cost.SOFTMAX_KD, backend, replace(shape, teachers=1, widths=(width, width)))
        waiting = 4 * (2 * count - 1) * cost.FP32 * shape.pairs**2 if backend in ("eager", "compiled") else 0
        return LossCost(one.memory + waiting, 2 * count * one.wire, 2 * count * one.flops)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        losses = []
        for place, teacher in enumerate(context.teachers):
            queries = self.queries(context.student, place)
            exchanged = teacher._replace(image=teacher.text, text=teacher.image)
            ways = ((queries.image, teacher), (queries.text, exchanged))
            parts = [
                similarity_kd(
                    queries._replace(image=own, text=taught.text), taught, directions=(0.5, 0.0), group=context.group, **self._options
                )
                for own, taught in ways
            ]
            losses.append(parts[0].kd + parts[1].kd)
        return {self.names[0]: context.mean(losses)}
