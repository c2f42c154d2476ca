"""`interactive`: the student's projected embeddings as queries among the teacher's embeddings of the other modality."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from megakd.models.embeddings import Embeddings
from megakd.models.heads import Head, ModelShape, head_between
from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, head_name, kernel_options
from megakd.objectives.cost import LossCost, LossShape
from megakd.recipe import Recipe
from megakd_kernels import interactive_kd


@final
class Interactive(Objective):
    """Interactive contrastive learning (ICL of CLIP-KD, arXiv 2307.12732), see `megakd_kernels.interactive_kd`.

    A head of its own brings the student to the teacher's width. The cosines are multiplied by the student's logit scale, by the number
    that `interactive.scale` is, or by a scale that the head learns beside the student's, as in the authors' code; there it is its logarithm
    that multiplies.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        assert recipe.student is not None, "a recipe with objectives has a student"
        self._kind, self._scale = recipe.interactive.head, recipe.interactive.scale
        self._max_scale = recipe.student.max_scale if self._scale == "own" else None
        self._options = kernel_options(recipe, "interactive_kd", device)
        self.backend = self._options["backend"]

    def head(self, student: ModelShape, teacher: ModelShape) -> Head:
        return head_between(f"{self.names[0]}.head", self._kind, student, teacher, self._max_scale)

    def cost(self, shape: LossShape) -> LossCost:
        return cost.of_kernel(cost.INTERACTIVE, self._options["backend"], shape)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        (name,), student, losses = self.names, context.student, []
        for place, teacher in enumerate(context.teachers):
            head = head_name(name, place)
            image_BD, text_BD = student.projected[head]
            queries = student._replace(image=image_BD, text=text_BD, scale=self._scale_of(student, head))
            losses.append(interactive_kd(queries, teacher, group=context.group, **self._options))
        return {name: context.mean(losses)}

    def _scale_of(self, student: Embeddings, head: str) -> Tensor:
        if self._scale == "student":
            return student.scale
        return student.features[f"{head}.scale"] if self._scale == "own" else student.scale.new_tensor(self._scale)
