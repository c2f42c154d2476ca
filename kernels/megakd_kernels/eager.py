"""The similarity losses by plain autograd over whole N x N logits: the fastest while the matrix is small. Also under torch.compile.

Several ranks: every rank computes the whole matrix of the gathered rows, so nothing but the gather itself is exchanged.

Legend: B local rows, N rows of all ranks, D width, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div

from megakd_kernels.distributed import Ranks
from megakd_kernels.precision import product, run
from megakd_kernels.types import SimilarityLoss, Towers, compute_dtype


class GatherRows(torch.autograd.Function):
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


def gather(local_BD: Tensor, ranks: Ranks) -> Tensor:
    gathered: Tensor = local_BD if ranks.world == 1 else GatherRows.apply(local_BD, ranks)
    return gathered


def _towers_ND(towers: Towers, ranks: Ranks, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both sides of scale * image @ text.T. The scale goes into the local rows before the gather: it too then gets its own rows' share."""
    return gather(towers.image.to(dtype) * towers.scale.to(dtype), ranks), gather(towers.text.to(dtype), ranks)


def _divergence_N(soft_NN: Tensor, target_NN: Tensor, dim: int) -> Tensor:
    """KL(target || soft) of each line. Summed a line first: one sum over all N x N terms lost 8e-7 at N = 2048."""
    return kl_div(soft_NN.log_softmax(dim), target_NN.log_softmax(dim), reduction="none", log_target=True).sum(dim)


def _losses(
    logits_NN: Tensor, teachers: Sequence[Callable[[], Tensor]], temperature: float, hard: bool, directions: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """teachers: what forms each one's (N, N) logits, which are let go as soon as they are divided."""
    kd = infonce = logits_NN.new_zeros(())
    for form in teachers:
        soft_NN, target_NN = logits_NN / temperature, form() / temperature
        by_row, by_column = (_divergence_N(soft_NN, target_NN, dim).sum() * weight for dim, weight in zip((1, 0), directions, strict=True))
        kd = kd + (by_row + by_column) * (temperature**2 / (len(teachers) * len(logits_NN)))
    if hard:
        by_row, by_column = (logits_NN.log_softmax(dim).diagonal().mean() * weight for dim, weight in zip((1, 0), directions, strict=True))
        infonce = -(by_row + by_column)
    return kd, infonce


def _losses_of_flat(temperature: float, hard: bool, directions: tuple[float, float], *sides: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of each model, one after the other, the student's first."""
    (left_ND, right_ND), *teachers = zip(sides[::2], sides[1::2], strict=True)
    return _losses(left_ND @ right_ND.T, [partial(_plain_product, *pair) for pair in teachers], temperature, hard, directions)


def _plain_product(left_ND: Tensor, right_ND: Tensor) -> Tensor:
    return left_ND @ right_ND.T


@cache
def _compiled_losses() -> Any:
    return torch.compile(_losses_of_flat, dynamic=False)


def eager(
    student: Towers,
    teachers: Sequence[Towers],
    *,
    temperature: float,
    hard: bool,
    directions: tuple[float, float],
    ranks: Ranks,
    compiled: bool = False,
) -> SimilarityLoss:
    """See `similarity_kd`. About ten N x N matrices live until the backward pass has run, about four where it is compiled."""
    dtype = compute_dtype(*student, *(tensor for towers in teachers for tensor in towers))
    sides = [_towers_ND(towers, ranks, dtype) for towers in (student, *teachers)]
    if compiled:
        losses = partial(_compiled_losses(), temperature, hard, directions)
        return SimilarityLoss(*run(losses, [tensor for side in sides for tensor in side]))
    own, *others = (partial(product, *side) for side in sides)
    return SimilarityLoss(*_losses(own(), others, temperature, hard, directions))
