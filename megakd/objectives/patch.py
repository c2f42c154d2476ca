"""`patch` and `patch_relation`: patch tokens of the student's blocks learn from those of the teacher's.

Legend: B local batch, h x w the smaller of the two grids, V = h * w, C the teacher block's width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megakd.models.grids import common_grid, on_grid
from megakd.models.heads import ModelShape, ObjectiveHead, projection
from megakd.models.patches import Read
from megakd.objectives.base import Objective, StepContext, head_name
from megakd.objectives.cost import FP32, LossCost, LossShape
from megakd.objectives.standardise import Standardiser, hadamard
from megakd.recipe import Recipe
from megakd.recipe.objectives import PatchRelation as Settings
from megakd.runtime.wire import Wire

_RELATION_BYTES = 64 << 20  # of token-token matrices that are held at a time


class PatchHead(ObjectiveHead):
    """For each pair of a student's and a teacher's block the student's tokens on the smaller grid, projected to the teacher's width.

    kind: "none" leaves the tokens as they are. Raises ValueError, naming `key`, for grids that do not fit each other.
    """

    def __init__(self, kind: str, pairs: list[tuple[int, int]], student: ModelShape, teacher: ModelShape, key: str) -> None:
        super().__init__()
        self.blocks = tuple(own for own, _ in pairs)
        shapes = [(student.patches[own], teacher.patches[other]) for own, other in pairs]
        self._grids = [common_grid(own, other, key) for own, other in shapes]
        self.summary = "" if kind == "none" else ", ".join(f"{kind} {own.width} -> {other.width}" for own, other in shapes)
        self.pairs = nn.ModuleList(projection(kind, own.width, other.width) for own, other in shapes)

    def project(
        self, image_BD: Tensor, text_BD: Tensor, patches: Mapping[Read, Tensor], teacher: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        parts = zip(self.blocks, self._grids, self.pairs, strict=True)
        return {str(place): project(on_grid(patches[block], grid)) for place, (block, grid, project) in enumerate(parts)}


class _OfBlocks(Objective):
    """A loss on each pair of a student's and a teacher's block; its value is their mean."""

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...], settings: Settings) -> None:
        super().__init__(recipe, device, names)
        self.of_pairs = names
        self.blocks = list(zip(settings.blocks, settings.read_blocks, strict=True))
        self.student_blocks, self.teacher_blocks = tuple(settings.blocks), tuple(settings.read_blocks)

    def maps(self, context: StepContext, place: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(teacher's block, (B, h, w, C) of the student's head, that of the teacher at `place` on the same grid)."""
        head = head_name(self.names[0], place)
        for number, (_, block) in enumerate(self.blocks):
            student_BhwC = context.student.features[f"{head}.{number}"]
            teacher_BhwC = context.teachers[place].features[f"patches.{block}"]
            yield block, student_BhwC, on_grid(teacher_BhwC, (student_BhwC.shape[1], student_BhwC.shape[2]))

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        return {self.names[0]: context.mean(self._of_teachers(context, by_image=False))}

    def pairs(self, context: StepContext) -> dict[str, Tensor]:
        """A pair's part is that of its image."""
        return {self.names[0]: context.mean_of_pairs(self._of_teachers(context, by_image=True))}

    def _of_teachers(self, context: StepContext, *, by_image: bool) -> list[Tensor]:
        losses = []
        for place in range(len(context.teachers)):
            maps = self.maps(context, place)
            parts = [self._of_block(own, other, f"{place}.{block}", context.group, by_image=by_image) for block, own, other in maps]
            losses.append(torch.stack(parts).mean(0))
        return losses

    @abstractmethod
    def _of_block(self, own_BhwC: Tensor, other_BhwC: Tensor, name: str, group: ProcessGroup | None, *, by_image: bool) -> Tensor:
        """(B,) by image, or () their mean, of the student's map and the teacher's. name: the teacher's place and block, for what is kept
        of them from step to step; by image nothing is added to it.
        """
        ...

    def cost(self, shape: LossShape) -> LossCost:
        """The teacher's tokens in float32, differences and the gradient at the student's outputs; the plan counts tokens as they come."""
        local, student, memory, flops = shape.pairs // shape.ranks, shape.models[0], 0, 0
        for teacher in shape.models[1:]:
            for own, other in self.blocks:
                mine, theirs = student.patches[own], teacher.patches[other]
                numbers = min(mine.count, theirs.count) * theirs.width
                memory += local * 4 * FP32 * numbers
                flops += 20 * local * numbers
        return LossCost(memory, Wire(), flops)


@final
class Patch(_OfBlocks):
    """Distance of projected student tokens to teacher tokens: mean over images, patches and channels, or 1 - cosine of each token.

    Dense feature KD as AM-RADIO's (arXiv 2312.06709); standardised teachers as in PHI-S (arXiv 2410.01680), see `standardise`. A mean over
    channels, because standardised channels have unit variance whatever the width.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names, recipe.patch)
        self._settings = recipe.patch

    def head(self, student: ModelShape, teacher: ModelShape) -> PatchHead:
        kind = self._settings.head
        for own, other in self.blocks:
            widths = student.patches[own].width, teacher.patches[other].width
            if kind == "none" and widths[0] != widths[1]:
                raise ValueError(
                    f"patch.head = 'none': block {own} of the student is {widths[0]} wide and block {other} of the teacher {widths[1]}; "
                    f"set it to 'linear' or 'mlp'"
                )
            if self._settings.standardise == "phi_s":
                try:
                    hadamard(widths[1])
                except ValueError as error:
                    raise ValueError(f"patch.standardise = 'phi_s': block {other} of the teacher: {error}") from error
        return PatchHead(kind, self.blocks, student, teacher, "patch.blocks")

    def _of_block(self, own_BhwC: Tensor, other_BhwC: Tensor, name: str, group: ProcessGroup | None, *, by_image: bool) -> Tensor:
        settings, own_BhwC, target_BhwC = self._settings, own_BhwC.float(), other_BhwC.float()
        if settings.standardise != "none":
            standardise = Standardiser(settings.standardise, settings.statistics, self.state, name, group)
            target_BhwC = standardise(target_BhwC.flatten(0, 2), learn=not by_image).view(target_BhwC.shape)
        reduction = "none" if by_image else "mean"
        if settings.loss == "cosine":
            found = 1 - F.cosine_similarity(own_BhwC, target_BhwC, dim=-1)
            return found.flatten(1).mean(1) if by_image else found.mean()
        found = (F.mse_loss if settings.loss == "mse" else F.smooth_l1_loss)(own_BhwC, target_BhwC, reduction=reduction)
        return found.flatten(1).mean(1) if by_image else found


@final
class PatchRelation(_OfBlocks):
    """Mean squared difference between the cosines of all pairs of tokens of an image, the student's and the teacher's; no head is trained.

    Gram anchoring (DINOv3, arXiv 2508.10104) and the spatial tuning of Perception Encoder (arXiv 2504.13181). Token-token matrices are
    made for a part of the batch at a time and again in the backward, so memory does not grow with the batch times V * V.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names, recipe.patch_relation)

    def head(self, student: ModelShape, teacher: ModelShape) -> PatchHead:
        return PatchHead("none", self.blocks, student, teacher, "patch_relation.blocks")

    def _of_block(self, own_BhwC: Tensor, other_BhwC: Tensor, name: str, group: ProcessGroup | None, *, by_image: bool) -> Tensor:
        own_BVC, other_BVE = own_BhwC.flatten(1, 2), other_BhwC.flatten(1, 2)
        batch, patches, _ = own_BVC.shape
        rows = max(1, _RELATION_BYTES // (FP32 * patches**2))
        parts = zip(own_BVC.split(rows), other_BVE.split(rows), strict=True)
        sums_B = torch.cat([checkpoint(_squares, own, other, use_reentrant=False) for own, other in parts])
        return sums_B / patches**2 if by_image else sums_B.sum() / (batch * patches**2)


def _squares(own_BVC: Tensor, other_BVE: Tensor) -> Tensor:
    """(B,)"""
    own_BVC, other_BVE = F.normalize(own_BVC.float(), dim=-1), F.normalize(other_BVE.float(), dim=-1)
    return (own_BVC @ own_BVC.transpose(1, 2) - other_BVE @ other_BVE.transpose(1, 2)).square().sum((1, 2))
