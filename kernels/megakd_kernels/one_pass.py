"""Losses that need one pass over the matrix: their gradients are accumulated beside the loss, and the backward pass only scales them.

What works on a panel of logits between its two products is a `OnePassKernels`: torch (`one_pass_torch`) or Triton (`triton.one_pass`).

Legend: B rows of this rank, M columns of a block, D width, c rows of a panel, K teachers. a student logits, b_k teacher logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megakd_kernels.panels import Logits
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
