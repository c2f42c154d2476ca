"""`relational`: the batch's images lie as far from each other as the teacher's."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.objectives.base import Objective, StepContext
from megakd_kernels import gather_with_grad


@final
class Relational(Objective):
    """Distances between the batch's images are those of the teacher's (RKD-D, arXiv 1904.05068)."""

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        (name,) = self.names
        own = _distances(gather_with_grad(context.student.image, context.group))
        losses = [F.smooth_l1_loss(own, _distances(gather_with_grad(one.image, context.group))) for one in context.teachers]
        return {name: torch.stack(losses).mean()}


def _distances(rows_ND: Tensor) -> Tensor:
    """(N (N - 1) / 2,) of each pair of rows, over their mean."""
    distances = F.pdist(rows_ND.float())
    return distances / distances.mean()
