"""The similarity losses by plain autograd over whole N x N logits: the fastest while the matrix is small.

Several ranks: every rank computes the whole matrix of the gathered rows, so nothing but the gather itself is exchanged.

Legend: B local rows, N rows of all ranks, D width, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div

from megakd_kernels.contract import SimilarityLoss, Towers, compute_dtype
from megakd_kernels.ranks import Ranks


class _GatherRows(torch.autograd.Function):
    """(B, D) -> (N, D). Every rank computes the same loss, so its own slice of the gradient is already complete.

    Times W: the mean that data parallelism takes over ranks then gives the gradient of the global loss.
    """

    @staticmethod
    def forward(ctx: Any, local_BD: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.rows = ranks, local_BD.shape[0]
        return ranks.gather(local_BD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        own = slice(ctx.ranks.rank * ctx.rows, (ctx.ranks.rank + 1) * ctx.rows)
        return grad_ND[own] * ctx.ranks.world, None


def _gather(local_BD: Tensor, ranks: Ranks) -> Tensor:
    gathered: Tensor = local_BD if ranks.world == 1 else _GatherRows.apply(local_BD, ranks)
    return gathered


def _logits_NN(towers: Towers, ranks: Ranks, dtype: torch.dtype) -> Tensor:
    """scale * image @ text.T. The scale is folded into the local rows before the gather, so that it too gets its own rows' share."""
    image_ND = _gather(towers.image.to(dtype) * towers.scale.to(dtype), ranks)
    return image_ND @ _gather(towers.text.to(dtype), ranks).T


def _divergence(soft_NN: Tensor, target_NN: Tensor, dim: int) -> Tensor:
    """Sum of KL(target || soft). Each line is summed by itself first: one sum over all N x N terms lost 8e-7 at N = 2048."""
    terms_NN = kl_div(soft_NN.log_softmax(dim), target_NN.log_softmax(dim), reduction="none", log_target=True)
    return terms_NN.sum(dim).sum()


def _diagonal(logits_NN: Tensor, dim: int) -> Tensor:
    return logits_NN.log_softmax(dim).diagonal().mean()


def eager(student: Towers, teacher: Towers | None, temperature: float, hard: bool, ranks: Ranks) -> SimilarityLoss:
    """See `similarity_kd`. About ten N x N matrices live until the backward pass has run."""
    dtype = compute_dtype(*student, *(teacher or ()))
    logits_NN = _logits_NN(student, ranks, dtype)
    kd = infonce = logits_NN.new_zeros(())
    if teacher is not None:
        soft_NN = logits_NN / temperature
        target_NN = _logits_NN(teacher, ranks, dtype) / temperature
        by_row, by_column = (_divergence(soft_NN, target_NN, dim) for dim in (1, 0))
        kd = (by_row + by_column) * (temperature**2 / (2 * len(logits_NN)))
    if hard:
        infonce = (_diagonal(logits_NN, 1) + _diagonal(logits_NN, 0)) / -2
    return SimilarityLoss(kd, infonce)
