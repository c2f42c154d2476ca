"""`gradient`: InfoNCE is to pull the student's embeddings where it would pull the teacher's."""

from __future__ import annotations

from typing import final

from torch import Tensor

from megakd.objectives import cost
from megakd.objectives.lines import LineObjective, Lines, Matrix
from megakd_kernels.precision import product

# Legend: c lines of a panel, N pairs of all ranks, D width.


@final
class Gradient(LineObjective):
    """1/2N * sum over images and texts of |g(student) - g(teacher)|^2, g = N * the gradient of InfoNCE with respect to an embedding:

    g(image i) = s/2 * sum_j (P_ij + Q_ij - 2 [i = j]) text_j, P and Q the softmaxes of the logits over rows and over columns, and likewise
    for texts. s is each model's own scale. Both models need one width: a gradient lives in the space of its embeddings.

    N makes g each pair's own and not the mean's share, and the square is summed over the width, so neither the batch nor the width
    changes the weight. InfoNCE is the mean of both directions, and its gradient is compared as a whole; the authors' code compares those
    of the two directions one by one, divides them by N, averages over the width, and passes through a tensor of N x D x N. Its weight of
    1e8, at N = 1,024 and D = 512, is between 0.7 and 1.5 here: 0.7 where both directions' differences are the same.
    Source: GD of CLIP-KD (arXiv 2307.12732).
    """

    family = cost.GRADIENT

    def prepared(self, matrix: Matrix, options: None) -> Matrix:
        return matrix.normalised()

    def compare(self, own: Lines, taught: Lines, options: None, part: slice) -> Tensor:
        student_cD, teacher_cD = (_gradients(lines, part) for lines in (own, taught))
        return (student_cD - teacher_cD).square().sum(1)


def _gradients(lines: Lines, part: slice) -> Tensor:
    """(c, D), g of these lines' embeddings."""
    log_p_cN, log_q_cN = lines.log_softmaxes(part)
    positives_c1 = lines.positives(part)
    slope_cN = (log_p_cN.exp() + log_q_cN.exp()).scatter_add(1, positives_c1, -2 * log_p_cN.new_ones(positives_c1.shape))
    return product(slope_cN, lines.all_ND.mT) * (lines.scale / 2)
