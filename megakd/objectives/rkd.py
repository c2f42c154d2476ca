"""`rkd`: distances between the student's embeddings of a modality, and angles in their triangles, are to be those of the teacher's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext
from megakd.objectives.cost import LossCost, LossShape
from megakd.objectives.lines import agreed, by_panels
from megakd.recipe import Recipe
from megakd.recipe.objectives import Relational as Options
from megakd_kernels.distributed import Ranks, add_parts, gather_for_parts
from megakd_kernels.panels import chunk_rows, chunks
from megakd_kernels.precision import product

# Legend: B pairs of this rank, N of all, D width; c lines of a panel, n points at which angles are measured.


@final
class Relational(Objective):
    """distance * 1/N^2 * sum_ij h(d_ij - e_ij) + angle * 1/N^3 * sum_ijk h(cos_ijk - cos'_ijk), of images, of texts, or the mean of both.

    d_ij = |x_i - x_j| over its mean over all i != j, e_ij of the teacher's; cos_ijk = the cosine of the angle at x_i between x_j and x_k,
    cos' of the teacher's; h the Huber loss, x^2 / 2 up to 1 and |x| - 1/2 beyond. Sums are over all indices, as in the authors' code;
    terms with equal ones are 0. Points that coincide but for their rounding have distance 0, no direction and no gradient; the authors'
    code divides that of such a direction by 1e-12.

    Distances cost N^2 D multiplications, angles N^3 D: at width 512 a modality takes 6.6 TFLOP a step at 1,024 pairs and 53 at 2,048, so
    large batches set angle to 0. Both are formed in panels, twice, whatever `[kernels]` says. No logit scale takes part.
    Source: Relational Knowledge Distillation (arXiv 1904.05068).
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        self._recipe, self.of_pairs = recipe, names
        self._sides = ("image", "text") if recipe.rkd.on == "both" else (recipe.rkd.on,)
        self.needs_text = self.reads_text = "text" in self._sides

    def cost(self, shape: LossShape) -> LossCost:
        distance, angle = (self._recipe.peak(f"rkd.{kind}") > 0 for kind in ("distance", "angle"))
        return cost.relational(shape, modalities=len(self._sides), distance=distance, angle=angle)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        (name,) = self.names
        ranks, losses = self._of_points(context)
        return {name: context.mean([add_parts(loss_B.sum(), ranks) / (len(loss_B) * ranks.world) for loss_B in losses])}

    def pairs(self, context: StepContext) -> dict[str, Tensor]:
        """A pair's part is that of its own points: their distances to all, and the angles there."""
        (name,) = self.names
        _, losses = self._of_points(context)
        return {name: context.mean_of_pairs(losses)}

    def _of_points(self, context: StepContext) -> tuple[Ranks, list[Tensor]]:
        """(B,) of each teacher: the mean over modalities of what this rank's points have in the loss, times N."""
        options: Options = self._recipe.section_at(self.names[0], context.step)
        # The ranks compare the shapes of pairs, and a teacher of images alone has no texts; nothing else reads them here.
        paired = [teacher if teacher.has_text else teacher._replace(text=teacher.image) for teacher in context.teachers]
        ranks, dtype = agreed(replace(context, teachers=paired))
        student = {side: Points.of(getattr(context.student, side), ranks, dtype) for side in self._sides}
        losses = []
        for teacher in context.teachers:
            parts = []
            for side, own in student.items():
                with torch.no_grad():
                    taught = Points.of(getattr(teacher, side), ranks, dtype)
                count = len(own.all_ND)
                if options.distance or not options.angle:  # one of them, also in a step in which schedules have both at 0
                    parts.append(options.distance * _of_distances(own, taught, ranks) / count)
                if options.angle:
                    parts.append(options.angle * _of_angles(own, taught) / count**2)
            losses.append(torch.stack(parts).sum(0) / len(student))
        return ranks, losses


class Points(NamedTuple):
    """One model's embeddings of one modality, less their mean: no difference depends on it, and distances would lose digits to it."""

    own_BD: Tensor
    all_ND: Tensor

    @classmethod
    def of(cls, embeddings_BD: Tensor, ranks: Ranks, dtype: torch.dtype) -> Points:
        all_ND = gather_for_parts(embeddings_BD, ranks, dtype)
        mean_D = all_ND.detach().mean(0)
        return cls(embeddings_BD.to(dtype) - mean_D, all_ND - mean_D)

    def distances(self, part: slice) -> Tensor:
        """(c, N), from these of the own points to all."""
        squares_cN = self.own_BD[part].square().sum(1, keepdim=True) + self.all_ND.square().sum(1)
        squared_cN = squares_cN - 2 * product(self.own_BD[part], self.all_ND)
        apart_cN = squared_cN > 8 * torch.finfo(squared_cN.dtype).eps * squares_cN
        return torch.where(apart_cN, squared_cN, 1).sqrt() * apart_cN

    def mean_distance(self, ranks: Ranks, chunk: int) -> Tensor:
        """Over all pairs of unlike points; 1 where all points coincide, or one is alone."""
        sums_B = by_panels(lambda part: self.distances(part).sum(1), len(self.own_BD), chunk)
        sums_N = gather_for_parts(sums_B, ranks, sums_B.dtype)
        mean = sums_N.sum() / max(1, len(sums_N) * (len(sums_N) - 1))
        return torch.where(mean > 0, mean, 1)

    def cosines(self, at: slice, part: slice) -> Tensor:
        """(n, c, N), of the angles at these own points between these of all points and each of all."""
        rays_nND = self.all_ND - self.own_BD[at, None]
        length_nN1 = torch.linalg.vector_norm(rays_nND, dim=2, keepdim=True)
        rounding = 8 * torch.finfo(rays_nND.dtype).eps
        none_nN1 = length_nN1 <= rounding * torch.linalg.vector_norm(self.all_ND.detach(), dim=1, keepdim=True)
        units_nND = (rays_nND / length_nN1.masked_fill(none_nN1, 1)).masked_fill(none_nN1, 0)
        return product(units_nND[:, part], units_nND)


def _of_distances(own: Points, taught: Points, ranks: Ranks) -> Tensor:
    """(B,), the sum over all points of the losses of their distances to each of this rank's."""
    rows, columns = len(own.own_BD), len(own.all_ND)
    chunk = chunk_rows(rows, columns, own.all_ND.dtype, own.all_ND.device)
    own_mean = own.mean_distance(ranks, chunk)
    with torch.no_grad():
        taught_mean = taught.mean_distance(ranks, chunk)

    def losses(part: slice) -> Tensor:
        return smooth_l1_loss(own.distances(part) / own_mean, taught.distances(part) / taught_mean, reduction="none").sum(1)

    return by_panels(losses, rows, chunk)


def _of_angles(own: Points, taught: Points) -> Tensor:
    """(B,), the sum of the losses of the angles at each of this rank's points."""
    dtype, device, (points, width) = own.all_ND.dtype, own.all_ND.device, own.all_ND.shape
    at_once = chunk_rows(len(own.own_BD), points * max(points, width, taught.all_ND.shape[1]), dtype, device)
    chunk = chunk_rows(points, points, dtype, device)

    def losses(at: slice, part: slice) -> Tensor:
        return smooth_l1_loss(own.cosines(at, part), taught.cosines(at, part), reduction="none").sum(2).T

    return torch.cat([by_panels(partial(losses, at), points, chunk).sum(0) for at in chunks(len(own.own_BD), at_once)])
