"""`interactive`: the student's projected embeddings as queries among the teacher's embeddings of the other modality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.models.student import Head
from megakd.objectives.base import head_name, kernel_options
from megakd.recipe import Recipe
from megakd_kernels import interactive_kd

INTERACTIVE = "interactive"


class Interactive:
    """Interactive contrastive learning (ICL of CLIP-KD, arXiv 2307.12732), see `megakd_kernels.interactive_kd`.

    The student's own logit scale multiplies the cosines. A head of its own brings the student to the teacher's width.
    """

    names: tuple[str, ...] = (INTERACTIVE,)

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._kind = recipe.interactive.head
        self._options = kernel_options(recipe, "interactive_kd", device)
        self.backend: str | None = self._options["backend"]

    def head(self, student_width: int, teacher_width: int) -> nn.Module | None:
        return Head(self._kind, student_width, teacher_width)

    def __call__(self, student: Embeddings, teachers: Sequence[Embeddings], group: ProcessGroup | None) -> dict[str, Tensor]:
        losses = []
        for place, teacher in enumerate(teachers):
            image_BD, text_BD = student.projected[head_name(INTERACTIVE, place)]
            losses.append(interactive_kd(student._replace(image=image_BD, text=text_BD), teacher, group=group, **self._options))
        return {INTERACTIVE: torch.stack(losses).mean()}


def interactive(recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> list[Interactive]:
    return [Interactive(recipe, device)]
