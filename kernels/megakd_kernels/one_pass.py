"""Losses that need one pass over the matrix: their gradients are accumulated beside the loss, and the backward pass only scales them.

What works on a panel of logits between its two products is a `OnePassKernels`: torch (`TorchOnePass`) or Triton (`triton.one_pass`).

Legend: B rows of this rank, M columns of a block, D width, c rows of a panel, K teachers. a student logits, b_k teacher logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megakd_kernels.panels import Logits, chunks, scratch_panels
from megakd_kernels.precision import save, saved_once

Gradients = tuple[Tensor | None, ...]


def half_gain(dtype: torch.dtype) -> float:
    """The factor on slopes, at most 1 in size, where embeddings are in `dtype`: keeps them above float16's 6e-8 as they are cast. Exact."""
    return 2.0**14 if dtype == torch.float16 else 1.0


class BiasedLogits(NamedTuple):
    """logits + bias, the bias of shape () in the logits' dtype."""

    logits: Logits
    bias: Tensor

    def rows(self, selected: slice, out: Tensor) -> Tensor:
        return self.logits.rows(selected, out).add_(self.bias)


class ExpPanel(NamedTuple):
    """One panel of exp(a - m_c). A row's positive takes no part in any of it, except `positive_c`.

    m_c: largest logit so far. l_c: sum of exp(a - m_c) over this panel. exp_cM: half_gain * exp(a - m_c), 0 at the positive, in a dtype
    that the products take; None where not wanted. positive_c: a of the positive; None where its column is elsewhere.
    """

    rows: slice
    positive_c: Tensor | None
    m_c: Tensor
    l_c: Tensor
    exp_cM: Tensor | None


class SigmoidPanel(NamedTuple):
    """One part (KD or SigLIP) of a sigmoid loss over one panel: the rows' sums of the loss and of its slope d loss / da, and the slope.

    slope_cM: half_gain * slope, in a dtype that the products take; with slope_c None where not wanted. All lack the factor 1 / N.
    """

    loss_c: Tensor
    slope_c: Tensor | None
    slope_cM: Tensor | None


class OnePassKernels(Protocol):
    """Both go panel by panel through the rows; each panel may reuse the memory of the one before.

    diagonal: column `row + diagonal` is a row's positive; None: it is in another block.
    """

    def exp_panels(self, logits: Logits, diagonal: int | None, m_B: Tensor, slopes: bool) -> Iterator[ExpPanel]:
        """m_B: the largest logit of each row in the blocks before, the lowest finite number at first. slopes: whether exp_cM is wanted."""

    def sigmoid_panels(
        self, student: BiasedLogits, teachers: Sequence[BiasedLogits], diagonal: int | None, hard: bool, slopes: bool
    ) -> Iterator[tuple[slice, tuple[SigmoidPanel, ...]]]:
        """Rows and their parts: KD where there is a teacher, then SigLIP's loss where `hard`."""


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


class _PrecomputedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: tuple[Tensor, ...], gradients: tuple[Gradients, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        save(ctx, gradients)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Gradients, ...] = saved_once(ctx)
        totals: list[Tensor | None] = []
        for number, dtype in enumerate(ctx.dtypes):
            terms = [grad * each for grad, of in zip(upstream, gradients, strict=True) if (each := of[number]) is not None]
            totals.append(sum(terms[1:], start=terms[0]).to(dtype) if terms else None)
        return None, None, *totals


def differentiable(losses: tuple[Tensor, ...], gradients: tuple[Gradients, ...], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The losses as functions of `inputs`. gradients: of each loss, one of each input's shape; None where not needed.

    Both may be in a higher precision than the inputs; gradients are rounded once, after they are multiplied by the upstream gradient.
    """
    if all(each is None for of in gradients for each in of):
        return losses
    outputs: tuple[Tensor, ...] = _PrecomputedGradients.apply(losses, gradients, *inputs)
    return outputs
