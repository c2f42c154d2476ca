"""The panels of the one-pass losses in plain torch.

Legend: B rows of this rank, M columns of a block, D width, c rows of a panel, K teachers. a student logits, b_k teacher logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.one_pass import BiasedLogits, ExpPanel, SigmoidPanel, half_gain
from megakd_kernels.panels import Logits, chunks, scratch_panels


def _cast_slope(slope_cM: Tensor, logits: Logits) -> Tensor:
    """half_gain * slope, in the dtype that the products take."""
    gain = half_gain(logits.left_BD.dtype)
    return (slope_cM if gain == 1 else slope_cM.mul_(gain)).to(logits.right_ND.dtype)


class TorchOnePass(NamedTuple):
    """`OnePassKernels` on any device. chunk: rows of a panel."""

    chunk: int

    def exp_panels(self, logits: Logits, diagonal: int | None, m_B: Tensor, slopes: bool) -> Iterator[ExpPanel]:
        (panel,) = scratch_panels(1, self.chunk, logits)
        for rows in chunks(len(logits.left_BD), self.chunk):
            a_cM = logits.rows(rows, panel)
            positive_c = None
            if diagonal is not None:
                view_c = a_cM.diagonal(diagonal + rows.start)
                positive_c = view_c.clone()
                view_c.fill_(-torch.inf)
            m_c = torch.maximum(a_cM.amax(1), m_B[rows])
            l_c = a_cM.sub_(m_c[:, None]).exp_().sum(1)
            yield ExpPanel(rows, positive_c, m_c, l_c, _cast_slope(a_cM, logits) if slopes else None)

    def sigmoid_panels(
        self, student: BiasedLogits, teachers: Sequence[BiasedLogits], diagonal: int | None, hard: bool, slopes: bool
    ) -> Iterator[tuple[slice, tuple[SigmoidPanel, ...]]]:
        logits = student.logits
        scratch = scratch_panels(8 if teachers else 4, self.chunk, logits)
        for rows in chunks(len(logits.left_BD), self.chunk):
            a_cM, softplus_neg_abs_cM, sigmoid_cM, slope_cM, *work = (panel[: rows.stop - rows.start] for panel in scratch)
            student.rows(rows, a_cM)
            # log1p(exp(-|a|)): exact to the last digits however small it is, as N of these are summed for each pair
            torch.abs(a_cM, out=softplus_neg_abs_cM).neg_().exp_().log1p_()
            torch.sigmoid(a_cM, out=sigmoid_cM)
            parts: list[SigmoidPanel] = []
            if teachers:
                loss_c = _kd(a_cM, softplus_neg_abs_cM, teachers, rows, slope_cM, work)
                slope_cM.div_(-len(teachers)).add_(sigmoid_cM)
                parts.append(_part(loss_c, slope_cM, logits, slopes))
            if hard:
                loss_c = _siglip(a_cM, softplus_neg_abs_cM, sigmoid_cM, diagonal, rows.start)
                parts.append(_part(loss_c, sigmoid_cM, logits, slopes))
            yield rows, tuple(parts)


def _part(loss_c: Tensor, slope_cM: Tensor, logits: Logits, slopes: bool) -> SigmoidPanel:
    return SigmoidPanel(loss_c, slope_cM.sum(1), _cast_slope(slope_cM, logits)) if slopes else SigmoidPanel(loss_c, None, None)


def _kd(
    a_cM: Tensor, softplus_neg_abs_cM: Tensor, teachers: Sequence[BiasedLogits], rows: slice, target_cM: Tensor, work: Sequence[Tensor]
) -> Tensor:
    """(c,) sums of the mean over teachers of KL(Bernoulli(sigmoid b) || Bernoulli(sigmoid a)); target_cM becomes the sum of sigmoid(b).

    softplus(a) - softplus(b) - sigmoid(b) (a - b) cancels where both are large and positive; the same with both signs turned does not.
    So each pair is taken with the sign that makes the teacher's logit negative, x = -a sign(b) and y = -|b|: then all terms are small
    where the result is. softplus(x) = max(x, 0) + softplus(-|a|).
    """
    target_cM.zero_()
    loss_c = a_cM.new_zeros(len(a_cM))
    one = a_cM.new_ones(())
    b_cM, neg_x_cM, negative_loss_cM, sigmoid_y_cM = work
    for teacher in teachers:
        teacher.rows(rows, b_cM)
        target_cM.add_(torch.sigmoid(b_cM, out=neg_x_cM))
        torch.copysign(one, b_cM, out=neg_x_cM).mul_(a_cM)
        torch.sub(b_cM.abs_(), neg_x_cM, out=negative_loss_cM)  # x - y
        torch.sigmoid(b_cM.neg_(), out=sigmoid_y_cM)
        negative_loss_cM.mul_(sigmoid_y_cM).add_(neg_x_cM.clamp_max_(0))  # sigmoid(y) (x - y) - max(x, 0)
        negative_loss_cM.add_(b_cM.exp_().log1p_().sub_(softplus_neg_abs_cM))
        loss_c -= negative_loss_cM.sum(1)
    return loss_c / len(teachers)


def _siglip(a_cM: Tensor, softplus_neg_abs_cM: Tensor, sigmoid_cM: Tensor, diagonal: int | None, start: int) -> Tensor:
    """(c,) sums of softplus(-z a). sigmoid_cM, at first sigmoid(a), becomes the slope. The other two panels are overwritten.

    The positives are computed apart: sigmoid(a) - 1 and softplus(a) - a have no correct digit left where a pair is well matched.
    """
    if diagonal is None:
        return softplus_neg_abs_cM.add_(a_cM.clamp_min_(0)).sum(1)
    a_c, loss_c, slope_c = (panel_cM.diagonal(diagonal + start) for panel_cM in (a_cM, softplus_neg_abs_cM, sigmoid_cM))
    slope_c.copy_(-torch.sigmoid(-a_c))
    positive_loss_c = loss_c + (-a_c).clamp_min(0)
    softplus_neg_abs_cM.add_(a_cM.clamp_min_(0))
    loss_c.copy_(positive_loss_c)
    return softplus_neg_abs_cM.sum(1)
