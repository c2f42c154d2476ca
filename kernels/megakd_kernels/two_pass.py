"""The softmax losses in two passes over one stripe of the matrix, the rows of this rank by the columns of all: O(N (D + c)) memory.

The forward pass computes the statistics of the own rows, and its rows' part of those of the columns. The backward pass forms each panel
of logits again, turns it into the slope (d loss / d logits, differences of softmaxes) and multiplies it with the embeddings at once.
What works on the logits themselves is a `TwoPassKernels`: plain torch (`two_pass_torch`) or Triton (`triton.two_pass`).

Legend: B rows of this rank, N columns (rows of all ranks), M columns of a block, D width, c rows and C columns of a tile, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megakd_kernels.distributed import Block, Ranks, Sweep
from megakd_kernels.panels import Logits, add_product
from megakd_kernels.precision import full_precision, save, saved_once
from megakd_kernels.softmax_stats import (
    SLOPE_GAIN,
    SlopeWeights,
    SoftmaxStats,
    UpstreamGradients,
    join,
    merge,
    merge_over_ranks,
)
from megakd_kernels.types import CheckedPair, SimilarityLoss, compute_dtype, needs_grad

Kept = tuple[Tensor, ...]
"""Logits of a forward pass for the backward pass, which leaves them as they are; () where all are formed again."""


class StripeLogits(NamedTuple):
    """Logits over the temperature, rows of this rank by a block's columns. Column `row + diagonal` is a row's positive; None: elsewhere."""

    student: Logits
    teachers: tuple[Logits, ...]
    diagonal: int | None


class TwoPassKernels(Protocol):
    """What is done to logits. hard_temperature: see `softmax_stats`; None where the hard part needs no sum of its own."""

    def logits(self, left_BD: Tensor, right_MD: Tensor, gain: Tensor) -> Logits:
        """gain * left @ right.T, in the form that the other two methods take."""

    def statistics(
        self, logits: StripeLogits, hard_temperature: float | None, keep: bool
    ) -> tuple[SoftmaxStats, SoftmaxStats, Tensor | None, Kept]:
        """Of the rows and of the columns over these logits alone, and the student's logits on the diagonal, (B,), if it is there.

        keep: whether logits may be kept for `slopes`, as many as take no more memory than the embeddings.
        """

    def slopes(
        self,
        logits: StripeLogits,
        sides: tuple[SlopeWeights, SlopeWeights],
        hard_temperature: float | None,
        diagonal_weight: Tensor,
        kept: Kept,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and there SLOPE_GAIN * slope, (c, C), in a dtype that the products take; each may reuse the one before.

        sides: weights of the rows and of the columns. diagonal_weight: () to be subtracted on the diagonal. kept: of `statistics`.
        """


class TwoPass(NamedTuple):
    """What is to be computed, all of it known on the host. directions: the weights of rows and columns, 0.5 each for their mean."""

    temperature: float
    hard: bool
    directions: tuple[float, float]
    kernels: TwoPassKernels
    ranks: Ranks
    ring: bool

    @property
    def hard_temperature(self) -> float | None:
        """None at temperature 1, where the hard part shares the KD part's student softmax."""
        return self.temperature if self.hard and self.temperature != 1 else None

    def logits(self, student: CheckedPair, teachers: Sequence[CheckedPair], block: Block, dtype: torch.dtype) -> StripeLogits:
        """The own rows by a block's columns, whose tensors are the student's texts and each teacher's."""
        of_student, *of_teachers = (
            self.kernels.logits(pair.image, right_MD, pair.scale.to(dtype) / self.temperature)
            for pair, right_MD in zip((student, *teachers), block.tensors, strict=True)
        )
        return StripeLogits(of_student, tuple(of_teachers), block.diagonal(self.ranks.rank * len(student.image)))


class _Statistics(NamedTuple):
    """Of the own rows, of all N columns over the rows of all ranks, the own diagonal of the student's logits, and what was kept of them."""

    rows: SoftmaxStats
    columns: SoftmaxStats
    diagonal_B: Tensor
    kept: Kept


def _statistics(
    student: CheckedPair, teachers: Sequence[CheckedPair], sweep: Sweep, dtype: torch.dtype, plan: TwoPass, keep: bool
) -> _Statistics:
    rows: SoftmaxStats | None = None
    kept: Kept = ()
    columns: dict[int, SoftmaxStats] = {}
    diagonal_B: Tensor | None = None
    for block in sweep:
        logits = plan.logits(student, teachers, block, dtype)
        of_rows, columns[block.first], diagonal, kept = plan.kernels.statistics(logits, plan.hard_temperature, keep)
        rows = of_rows if rows is None else merge([rows, of_rows], plan.hard_temperature)
        diagonal_B = diagonal if diagonal_B is None else diagonal_B
    assert rows is not None
    assert diagonal_B is not None
    joined = join([columns[first] for first in sorted(columns)])
    return _Statistics(rows, merge_over_ranks(joined, plan.ranks, plan.hard_temperature), diagonal_B, kept)


def _losses(stats: _Statistics, plan: TwoPass) -> tuple[Tensor, Tensor]:
    """KD and InfoNCE. Each rank sums its own rows and the columns of its own texts; the sums are added in rank order."""
    first = plan.ranks.rank * len(stats.diagonal_B)
    sides = (stats.rows, stats.columns.lines(slice(first, first + len(stats.diagonal_B))))
    kd = hard = stats.diagonal_B.new_zeros(())
    for lines, weight in zip(sides, plan.directions, strict=True):
        if lines.cross_term is not None:
            kd = kd + lines.divergence().sum() * (weight * plan.temperature**2)
        if plan.hard:
            hard = hard + lines.infonce(stats.diagonal_B, plan.hard_temperature).sum() * weight
    sums_W2 = plan.ranks.gather(torch.stack([kd, hard])[None]) / len(stats.columns.m_a)
    return sums_W2[:, 0].sum(), sums_W2[:, 1].sum()


class _Gradients(NamedTuple):
    """None where not needed. All of them lack the factor unit / 2N * W that the caller knows; the embeddings' also lack the scale."""

    image_BD: Tensor | None
    text_BD: Tensor | None
    scale: Tensor | None


class _Saved(NamedTuple):
    """From forward to backward. columns: the gathered texts of student and teachers; none where a ring brings them again."""

    student: CheckedPair
    teachers: tuple[CheckedPair, ...]
    statistics: _Statistics
    columns: tuple[Tensor, ...]


def _gradients(saved: _Saved, sweep: Sweep, upstream: UpstreamGradients, plan: TwoPass, needs: tuple[bool, ...]) -> _Gradients:
    """needs: whether the gradients of image, text and scale are needed. `sweep` must bring gradients where that of text is."""
    student, teachers, stats, _ = saved
    need_image, need_text, need_scale = needs
    dtype = stats.diagonal_B.dtype
    rows, columns = (
        SlopeWeights.of(lines, upstream, 2 * weight) for lines, weight in zip((stats.rows, stats.columns), plan.directions, strict=True)
    )
    diagonal_weight = upstream.hard * (2 * sum(plan.directions) * SLOPE_GAIN)
    image_BD = torch.zeros_like(student.image, dtype=dtype) if need_image or need_scale else None
    for block in sweep:
        logits = plan.logits(student, teachers, block, dtype)
        right_MD = logits.student.right_ND
        left_BD = student.image.to(right_MD.dtype)
        sides = (rows, columns.lines(slice(block.first, block.first + len(right_MD))))
        for of_rows, of_columns, slope_cC in plan.kernels.slopes(logits, sides, plan.hard_temperature, diagonal_weight, stats.kept):
            if image_BD is not None:
                add_product(image_BD[of_rows], slope_cC, right_MD[of_columns])
            if block.grad is not None:
                add_product(block.grad[of_columns], slope_cC.T, left_BD[of_rows])
    scale = (image_BD * student.image).sum(1).sum() if need_scale and image_BD is not None else None
    return _Gradients(image_BD if need_image else None, sweep.own_grad() if need_text else None, scale)


def _sweep(
    student: CheckedPair, teachers: Sequence[CheckedPair], plan: TwoPass, grad_like: Tensor | None, columns: tuple[Tensor, ...] = ()
) -> Sweep:
    return Sweep([pair.text for pair in (student, *teachers)], plan.ranks, ring=plan.ring, grad_like=grad_like, gathered=columns)


class _TwoPassLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, teachers: tuple[CheckedPair, ...], plan: TwoPass, keep: bool
    ) -> tuple[Tensor, Tensor]:
        student = CheckedPair(image, text, scale)
        dtype = compute_dtype(*student, *(tensor for pair in teachers for tensor in pair))
        sweep = _sweep(student, teachers, plan, None)
        stats = _statistics(student, teachers, sweep, dtype, plan, keep)
        save(ctx, _Saved(student, teachers, stats, sweep.gathered))
        ctx.plan = plan
        kd, hard = _losses(stats, plan)
        ctx.mark_non_differentiable(*(() if teachers else (kd,)), *(() if plan.hard else (hard,)))
        return kd, hard

    @staticmethod
    def backward(ctx: Any, grad_kd: Tensor, grad_hard: Tensor) -> tuple[Tensor | None, ...]:
        plan: TwoPass = ctx.plan
        saved: _Saved = saved_once(ctx)
        student, dtype = saved.student, saved.statistics.diagonal_B.dtype
        needs = ctx.needs_input_grad[:3]
        with full_precision(student.image.device):
            grad_like = student.text.new_empty((0, student.text.shape[1]), dtype=dtype) if needs[1] else None
            sweep = _sweep(student, saved.teachers, plan, grad_like, saved.columns)
            upstream = UpstreamGradients.of(grad_kd, grad_hard, plan.temperature)
            gradients = _gradients(saved, sweep, upstream, plan, needs)
            # times W: the mean that data parallelism takes over ranks then gives the gradient of the global loss
            factor = upstream.unit * (plan.ranks.world / (2 * len(saved.statistics.columns.m_a) * SLOPE_GAIN))
            scaled = factor * student.scale.to(dtype)
            image = None if gradients.image_BD is None else gradients.image_BD.mul_(scaled).to(student.image.dtype)
            text = None if gradients.text_BD is None else gradients.text_BD.mul_(scaled).to(student.text.dtype)
            scale = None if gradients.scale is None else (gradients.scale * factor).to(student.scale.dtype)
        return image, text, scale, None, None, None


def two_pass(student: CheckedPair, teachers: tuple[CheckedPair, ...], plan: TwoPass) -> SimilarityLoss:
    """See `similarity_kd`."""
    if not teachers:
        plan = plan._replace(temperature=1.0)  # only the hard part is left, and its own temperature is 1
    # A ring is for memory that is short; and its blocks of columns pass by one at a time.
    keep = any(needs_grad(*student)) and not plan.ring
    return SimilarityLoss(*_TwoPassLoss.apply(*student, teachers, plan, keep))
