"""The softmax losses by plain autograd over whole N x N logits: the fastest while the matrix is small. Also under torch.compile.

On several ranks every rank computes the whole matrix of the gathered rows, so nothing but the gather communicates.

Legend: B rows of this rank, N rows of all ranks, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from megakd_kernels.distributed import Ranks, gather_rows
from megakd_kernels.precision import product, run_compiled
from megakd_kernels.types import CheckedPair, SimilarityLoss, compute_dtype


def _factors_ND(pair: CheckedPair, ranks: Ranks, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale * image, text), whose product is the logits. The scale multiplies the local rows, so its gradient is of the own rows too."""
    return gather_rows(pair.image.to(dtype) * pair.scale.to(dtype), ranks), gather_rows(pair.text.to(dtype), ranks)


def _divergence_N(student_NN: Tensor, teacher_NN: Tensor, dim: int) -> Tensor:
    """KL(teacher || student) of each line. Summed a line first: one sum over all N x N terms lost 8e-7 at N = 2048."""
    return kl_div(student_NN.log_softmax(dim), teacher_NN.log_softmax(dim), reduction="none", log_target=True).sum(dim)


def _losses(
    logits_NN: Tensor, teachers: Sequence[Callable[[], Tensor]], temperature: float, hard: bool, directions: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """teachers: functions that return each one's (N, N) logits, which are freed as soon as they are divided."""
    kd = infonce = logits_NN.new_zeros(())
    for teacher in teachers:
        student_NN, teacher_NN = logits_NN / temperature, teacher() / temperature
        by_row, by_column = (
            _divergence_N(student_NN, teacher_NN, dim).sum() * weight for dim, weight in zip((1, 0), directions, strict=True)
        )
        kd = kd + (by_row + by_column) * (temperature**2 / (len(teachers) * len(logits_NN)))
    if hard:
        by_row, by_column = (logits_NN.log_softmax(dim).diagonal().mean() * weight for dim, weight in zip((1, 0), directions, strict=True))
        infonce = -(by_row + by_column)
    return kd, infonce


def _losses_of_factors(temperature: float, hard: bool, directions: tuple[float, float], *factors: Tensor) -> tuple[Tensor, Tensor]:
    """factors: the two of each model, one after the other, the student's first."""
    (left_ND, right_ND), *teachers = zip(factors[::2], factors[1::2], strict=True)
    return _losses(left_ND @ right_ND.T, [partial(_plain_product, *pair) for pair in teachers], temperature, hard, directions)


def _plain_product(left_ND: Tensor, right_ND: Tensor) -> Tensor:
    return left_ND @ right_ND.T


def eager(
    student: CheckedPair,
    teachers: Sequence[CheckedPair],
    *,
    temperature: float,
    hard: bool,
    directions: tuple[float, float],
    ranks: Ranks,
    compiled: bool = False,
) -> SimilarityLoss:
    """See `similarity_kd`. About ten N x N matrices live until the backward pass has run, about four where it is compiled."""
    dtype = compute_dtype(*student, *(tensor for pair in teachers for tensor in pair))
    factors = [_factors_ND(pair, ranks, dtype) for pair in (student, *teachers)]
    if compiled:
        tensors = [tensor for pair in factors for tensor in pair]
        return SimilarityLoss(*run_compiled(_losses_of_factors, tensors, temperature, hard, directions))
    of_student, *of_teachers = (partial(product, *pair) for pair in factors)
    return SimilarityLoss(*_losses(of_student(), of_teachers, temperature, hard, directions))
