"""`interactive`: the student's projected embeddings as queries among the teacher's embeddings of the other modality."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from megakd.models.heads import Head, ModelShape
from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, head_name, kernel_options
from megakd.objectives.cost import LossCost, LossShape
from megakd.recipe import Recipe
from megakd_kernels import interactive_kd


@final
class Interactive(Objective):
    """Interactive contrastive learning (ICL of CLIP-KD, arXiv 2307.12732), see `megakd_kernels.interactive_kd`.

    The student's own logit scale multiplies the cosines. A head of its own brings the student to the teacher's width.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        self._kind = recipe.interactive.head
        self._options = kernel_options(recipe, "interactive_kd", device)
        self.backend = self._options["backend"]

    def head(self, student: ModelShape, teacher: ModelShape) -> Head:
        return Head(self._kind, student.width, teacher.width)

    def cost(self, shape: LossShape) -> LossCost:
        return cost.of_kernel(cost.INTERACTIVE, self._options["backend"], shape)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        (name,), student, losses = self.names, context.student, []
        for place, teacher in enumerate(context.teachers):
            image_BD, text_BD = student.projected[head_name(name, place)]
            losses.append(interactive_kd(student._replace(image=image_BD, text=text_BD), teacher, group=context.group, **self._options))
        return {name: context.mean(losses)}
