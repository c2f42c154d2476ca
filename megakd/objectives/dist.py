"""`dist`: the student's softmaxes are to vary with the teacher's, not to equal them."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from megakd.objectives import cost
from megakd.objectives.lines import LineObjective, Lines, Matrix, unit_about_mean
from megakd.recipe.objectives import Dist as Options

# Legend: c lines of a panel, N pairs of all ranks.


@final
class Dist(LineObjective):
    """The mean of both directions of t^2 * (beta * inter + gamma * intra), for P = softmax over the rows of b / t and of a / t:

    inter = 1 - mean over rows of the Pearson correlation of the teacher's P with the student's, intra = the same over the columns of P.
    The other direction is the same of the transposed matrix, so each line is compared twice: as a softmax, and as what the softmaxes of
    the lines across give it. Lines of equal numbers, as all are of a single pair, correlate fully with each other and not at all with
    others, without a gradient. The authors' code adds 1e-8 to the product of the norms, which keeps a student that is its teacher above 0.
    Source: DIST (arXiv 2205.10536), in which classes stand where the other modality does here.
    """

    family = cost.DIST

    def prepared(self, matrix: Matrix, options: Options) -> Matrix:
        return matrix.normalised(options.temperature)

    def compare(self, own: Lines, taught: Lines, options: Options, part: slice) -> Tensor:
        student, teacher = (lines.log_softmaxes(part, options.temperature) for lines in (own, taught))
        inter_c, intra_c = (_uncorrelated(*pair) for pair in zip(student, teacher, strict=True))
        return (options.beta * inter_c + options.gamma * intra_c) * options.temperature**2


def _uncorrelated(log_p_cN: Tensor, log_q_cN: Tensor) -> Tensor:
    """(c,), 1 - Pearson correlation of exp(log_p) and exp(log_q). A factor on a line changes nothing, so its largest number becomes 1:
    probabilities of 1e-30 have squares that float32 cannot hold.

    1 - u v of unit vectors is |u - v|^2 / 2, which is exactly 0 where they are equal.
    """
    p_cN, q_cN = (unit_about_mean((log_cN - log_cN.detach().amax(1, keepdim=True)).exp()) for log_cN in (log_p_cN, log_q_cN))
    # a line of equal numbers has become 0; against one that is not, the half below would be 1 / 2
    one_is_flat_c = p_cN.detach().any(1) != q_cN.any(1)
    return torch.where(one_is_flat_c, 1.0, (p_cN - q_cN).square().sum(1) / 2)
