"""`attention`: where the student's vision tower looks is to be where the teacher's does, as one map of an image for each pair of blocks.

Legend: B local batch, h x w a grid of patches, V = h * w of the smaller one, C a block's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.models.grids import common_grid, on_grid
from megakd.models.heads import ModelShape, ObjectiveHead
from megakd.models.patches import Read, Weights, feature_name
from megakd.objectives.base import Objective, StepContext, head_name
from megakd.objectives.cost import FP32, LossCost, LossShape
from megakd.recipe import Recipe
from megakd.runtime.wire import Wire


class AttentionHead(ObjectiveHead):
    """For each pair of what is read of a student's and of a teacher's block the student's map, (B, h, w, 1), on the smaller grid; nothing
    is trained.

    Raises ValueError, naming the recipe's key, for grids that do not fit each other.
    """

    def __init__(self, pairs: list[tuple[Read, Read]], student: ModelShape, teacher: ModelShape) -> None:
        super().__init__()
        self.blocks = tuple(own for own, _ in pairs)
        self._grids = [common_grid(student.patches[own], teacher.patches[other], "attention.blocks") for own, other in pairs]

    def project(
        self, image_BD: Tensor, text_BD: Tensor, patches: Mapping[Read, Tensor], teacher: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        parts = zip(self.blocks, self._grids, strict=True)
        return {str(place): on_grid(_map(block, patches[block]), grid) for place, (block, grid) in enumerate(parts)}


def _map(read: Read, seen_BhwC: Tensor) -> Tensor:
    """(B, h, w, 1) of what was read of a block."""
    return seen_BhwC if isinstance(read, Weights) else activation_map(seen_BhwC)


def activation_map(tokens_BhwC: Tensor) -> Tensor:
    """(B, h, w, 1) in float32: the mean of squares over channels. Its size is left to `_distances`, so the mean is as good as the sum."""
    return tokens_BhwC.float().square().mean(-1, keepdim=True)


@final
class AttentionTransfer(Objective):
    """Distance of the two towers' maps, each normalised over the patches of its image; mean over images and pairs of blocks.

    Zagoruyko and Komodakis, arXiv 1612.03928: maps of sums of squares over channels, at unit L2 norm. Maps are made on each tower's own
    grid and then interpolated, as they say, not the tokens. Their formula (2) has beta/2 times the norm of the difference for each block,
    their code the mean over images and patches of its square: a loss that falls with the number of patches, which this one does not.
    Or of the softmax of a ViT's own attention, see `Weights`, which with "kl" is what MiniLM (arXiv 2002.10957) has for every query.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        settings = recipe.attention
        self._loss, self.of_pairs = settings.loss, names
        read: Callable[[int], Read] = Weights if settings.map == "weights" else int
        self.student_blocks = tuple(map(read, settings.blocks))
        self.teacher_blocks = tuple(map(read, settings.read_blocks))
        self._pairs = list(zip(self.student_blocks, self.teacher_blocks, strict=True))

    def head(self, student: ModelShape, teacher: ModelShape) -> AttentionHead:
        return AttentionHead(self._pairs, student, teacher)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        return {self.names[0]: context.mean([loss_B.mean() for loss_B in self._of_images(context)])}

    def pairs(self, context: StepContext) -> dict[str, Tensor]:
        """A pair's part is that of its image."""
        return {self.names[0]: context.mean_of_pairs(self._of_images(context))}

    def _of_images(self, context: StepContext) -> list[Tensor]:
        """(B,) of each teacher: of each image the mean over pairs of blocks."""
        losses = []
        for place, teacher in enumerate(context.teachers):
            head, parts = head_name(self.names[0], place), []
            for number, block in enumerate(self.teacher_blocks):
                student_Bhw1 = context.student.features[f"{head}.{number}"]
                h, w = student_Bhw1.shape[1:3]
                with torch.no_grad():
                    teacher_Bhw1 = on_grid(_map(block, teacher.features[feature_name(block)]), (h, w))
                parts.append(_distances(student_Bhw1.flatten(1), teacher_Bhw1.flatten(1), self._loss))
            losses.append(torch.stack(parts).mean(0))
        return losses

    def cost(self, shape: LossShape) -> LossCost:
        """The squares of one block's tokens at a time; tokens as they come, and what heads hold, are counted by the plan."""
        local, made, flops = shape.pairs // shape.ranks, 0, 0
        for teacher in shape.models[1:]:
            for _, other in self._pairs:
                numbers = local * teacher.patches[other].count * teacher.patches[other].width
                made = max(made, numbers * FP32 * (1 + (shape.elements[1] < FP32)))
                flops += 2 * numbers
        return LossCost(made, Wire(), flops)


def _distances(own_BV: Tensor, other_BV: Tensor, loss: str) -> Tensor:
    """(B,), of maps that are nowhere negative."""
    own_BV, other_BV = own_BV.float(), other_BV.float()
    if loss == "kl":
        own_BV, other_BV = (F.normalize(part, p=1.0, dim=1) for part in (own_BV, other_BV))
        log_own_BV = own_BV.clamp(min=torch.finfo(own_BV.dtype).tiny).log()  # a softmax may have come to 0
        return F.kl_div(log_own_BV, other_BV, reduction="none").sum(1)
    difference_BV = F.normalize(own_BV, dim=1) - F.normalize(other_BV, dim=1)
    return torch.linalg.vector_norm(difference_BV, dim=1) if loss == "norm" else difference_BV.square().sum(1)
