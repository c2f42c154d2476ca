"""Losses that need one pass over the matrix: their gradients are accumulated beside the loss, and the backward pass only scales them.

Legend: B local rows, N rows of all ranks, D width, c rows of a panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from megakd_kernels.distributed import Block
from megakd_kernels.one_pass_torch import Elementwise, Torch
from megakd_kernels.panels import chunk_rows
from megakd_kernels.precision import ONCE

Gradients = tuple[Tensor | None, ...]


def panels_for(backend: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype, chunk: int | None) -> Elementwise:
    """What works on the panels of "chunked" or "triton", of `chunk` rows by a block of `columns`."""
    if backend == "triton":
        from megakd_kernels.triton.one_pass import Fused  # here: it imports triton

        return Fused.of(rows, columns, chunk)
    return Torch(chunk or chunk_rows(rows, columns, dtype, device))


def own_columns(block: Block, first: int) -> int | None:
    """Where in the block the own pairs begin, whose first column is `first`; None where they are in another block."""
    start = first - block.first
    return start if 0 <= start < len(block.tensors[0]) else None


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: tuple[Tensor, ...], gradients: tuple[Gradients, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        saved, ctx.layout = tree_flatten(gradients)
        ctx.save_for_backward(*saved)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` raises only where the upstream gradient carries a graph; after a plain loss it would drop the term.
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE)
        gradients: tuple[Gradients, ...] = tree_unflatten(ctx.saved_tensors, ctx.layout)
        totals: list[Tensor | None] = []
        for place, dtype in enumerate(ctx.dtypes):
            terms = [pull * each for pull, of in zip(upstream, gradients, strict=True) if (each := of[place]) is not None]
            totals.append(sum(terms[1:], start=terms[0]).to(dtype) if terms else None)
        return None, None, *totals


def differentiable(losses: tuple[Tensor, ...], gradients: tuple[Gradients, ...], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The losses as functions of `inputs`. gradients: of each loss, one of each input's shape; None where not needed.

    Both may be in a higher precision than the inputs; gradients are rounded once, after the upstream gradient came in.
    """
    if all(each is None for of in gradients for each in of):
        return losses
    made: tuple[Tensor, ...] = _Known.apply(losses, gradients, *inputs)
    return made
