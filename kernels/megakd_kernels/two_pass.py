"""The similarity losses in two passes over one stripe of the matrix, the rows of this rank by the columns of all: O(N (D + c)) memory.

The forward pass finishes the statistics of the own rows and adds its share to those of the columns. The backward pass forms each
panel of logits once more, turns it into the slope of the loss (softmax differences) and multiplies it with the embeddings at once.
What touches the matrix itself is left to `Kernels`: plain torch (`two_pass_torch`) or Triton (`triton.two_pass`).

Legend: B local rows, N columns (rows of all ranks), M columns of a block, D width, c rows of a panel, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from megakd_kernels.distributed import Block, Ranks, Sweep
from megakd_kernels.panels import Logits, add_product
from megakd_kernels.precision import ONCE, full_precision
from megakd_kernels.softmax_stats import SLOPE_GAIN, Normalisers, Pull, Softmaxes, join, merge, merge_over_ranks
from megakd_kernels.types import SimilarityLoss, Towers, compute_dtype


class Matrices(NamedTuple):
    """Logits over the temperature of some rows by some columns. Column `row + diagonal` holds a row's own pair; None: it is elsewhere."""

    student: Logits
    teachers: tuple[Logits, ...]
    diagonal: int | None


class Kernels(Protocol):
    """The two things that are done to logits. `sharpen` is set where the hard part needs a normaliser of its own."""

    def logits(self, left_BD: Tensor, right_MD: Tensor, gain: Tensor) -> Logits:
        """gain * left @ right.T, in whatever form the two below like best."""

    def statistics(self, matrices: Matrices, sharpen: float | None) -> tuple[Normalisers, Normalisers, Tensor | None]:
        """Of the rows and of the columns over these logits alone, and the student's logits on the diagonal, (B,), if it is there."""

    def slopes(
        self, matrices: Matrices, sides: tuple[Softmaxes, Softmaxes], sharpen: float | None, own_pair: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Panels (c, M) of SLOPE_GAIN * slope, in a dtype that the products take, and their rows; each may reuse the one before.

        sides: softmaxes of the rows and of the columns. own_pair: () to be subtracted on the diagonal.
        """


class Plan(NamedTuple):
    """What is asked for, all of it known on the host. directions: the weights of rows and columns, 0.5 each for their mean."""

    temperature: float
    hard: bool
    directions: tuple[float, float]
    kernels: Kernels
    ranks: Ranks
    ring: bool

    @property
    def sharpen(self) -> float | None:
        """Set where the hard part needs a normaliser of its own: at temperature 1 it is the student's softmax of the KD part."""
        return self.temperature if self.hard and self.temperature != 1 else None

    def matrices(self, student: Towers, teachers: Sequence[Towers], block: Block, dtype: torch.dtype) -> Matrices:
        """The own rows by a block's columns, whose tensors are the student's texts and each teacher's."""
        made = [
            self.kernels.logits(towers.image, right_MD, towers.scale.to(dtype) / self.temperature)
            for towers, right_MD in zip((student, *teachers), block.tensors, strict=True)
        ]
        diagonal = self.ranks.rank * len(student.image) - block.first
        return Matrices(made[0], tuple(made[1:]), diagonal if 0 <= diagonal < len(block.tensors[0]) else None)


class _Statistics(NamedTuple):
    """Of the own rows, of all N columns over the rows of all ranks, and the own diagonal of the student's logits."""

    rows: Normalisers
    columns: Normalisers
    diagonal_B: Tensor


def _statistics(student: Towers, teachers: Sequence[Towers], sweep: Sweep, dtype: torch.dtype, plan: Plan) -> _Statistics:
    rows: Normalisers | None = None
    shares: dict[int, Normalisers] = {}
    diagonal_B: Tensor | None = None
    for block in sweep:
        matrices = plan.matrices(student, teachers, block, dtype)
        of_rows, shares[block.first], diagonal = plan.kernels.statistics(matrices, plan.sharpen)
        rows = of_rows if rows is None else merge(rows, of_rows, plan.sharpen)
        diagonal_B = diagonal if diagonal_B is None else diagonal_B
    assert rows is not None
    assert diagonal_B is not None
    columns = join([shares[first] for first in sorted(shares)])
    return _Statistics(rows, merge_over_ranks(columns, plan.ranks, plan.sharpen), diagonal_B)


def _losses(of: _Statistics, plan: Plan) -> tuple[Tensor, Tensor]:
    """KD and InfoNCE. Each rank sums its own rows and the columns of its own texts; the sums are added in rank order."""
    first = plan.ranks.rank * len(of.diagonal_B)
    sides = (of.rows, of.columns.lines(slice(first, first + len(of.diagonal_B))))
    kd = hard = of.diagonal_B.new_zeros(())
    for lines, weight in zip(sides, plan.directions, strict=True):
        if lines.gap is not None:
            kd = kd + lines.divergence().sum() * (weight * plan.temperature**2)
        if plan.hard:
            hard = hard + lines.infonce(of.diagonal_B, plan.sharpen).sum() * weight
    sums_W2 = plan.ranks.gather(torch.stack([kd, hard])[None]) / len(of.columns.max_a)
    return sums_W2[:, 0].sum(), sums_W2[:, 1].sum()


class _Gradients(NamedTuple):
    """None where not wanted. All of them lack the factor unit / 2N * W that the caller knows; the embeddings also lack the scale."""

    image_BD: Tensor | None
    text_BD: Tensor | None
    scale: Tensor | None


def _gradients(
    student: Towers, teachers: Sequence[Towers], of: _Statistics, sweep: Sweep, pull: Pull, plan: Plan, wants: tuple[bool, ...]
) -> _Gradients:
    """wants: whether the gradients of image, text and scale are needed. `sweep` must bring shares where that of text is."""
    want_image, want_text, want_scale = wants
    dtype = of.diagonal_B.dtype
    rows, columns = (Softmaxes.of(lines, pull, 2 * weight) for lines, weight in zip((of.rows, of.columns), plan.directions, strict=True))
    own_pair = pull.hard * (2 * sum(plan.directions) * SLOPE_GAIN)
    image_BD = torch.zeros_like(student.image, dtype=dtype) if want_image or want_scale else None
    for block in sweep:
        matrices = plan.matrices(student, teachers, block, dtype)
        right_MD = matrices.student.right_ND
        sides = (rows, columns.lines(slice(block.first, block.first + len(right_MD))))
        for wanted, slope_cM in plan.kernels.slopes(matrices, sides, plan.sharpen, own_pair):
            if image_BD is not None:
                add_product(image_BD[wanted], slope_cM, right_MD)
            if block.share is not None:
                add_product(block.share, slope_cM.T, student.image[wanted])
    scale = (image_BD * student.image).sum(1).sum() if want_scale and image_BD is not None else None
    return _Gradients(image_BD if want_image else None, sweep.home() if want_text else None, scale)


class _Saved(NamedTuple):
    """From forward to backward. columns: the gathered texts of student and teachers; none where a ring brings them again."""

    student: Towers
    teachers: tuple[Towers, ...]
    statistics: _Statistics
    columns: tuple[Tensor, ...]


def _sweep(student: Towers, teachers: Sequence[Towers], plan: Plan, share: Tensor | None, columns: tuple[Tensor, ...] = ()) -> Sweep:
    texts = [towers.text for towers in (student, *teachers)]
    return Sweep(texts, plan.ranks, ring=plan.ring, share=share, gathered=columns)


class _SimilarityLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, teachers: tuple[Towers, ...], plan: Plan) -> tuple[Tensor, Tensor]:
        student = Towers(image, text, scale)
        dtype = compute_dtype(*student, *(tensor for towers in teachers for tensor in towers))
        sweep = _sweep(student, teachers, plan, None)
        of = _statistics(student, teachers, sweep, dtype, plan)
        saved, ctx.layout = tree_flatten(_Saved(student, teachers, of, sweep.gathered))
        ctx.save_for_backward(*saved)
        ctx.plan = plan
        kd, hard = _losses(of, plan)
        ctx.mark_non_differentiable(*(() if teachers else (kd,)), *(() if plan.hard else (hard,)))
        return kd, hard

    @staticmethod
    def backward(ctx: Any, grad_kd: Tensor, grad_hard: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` raises only where the upstream gradient carries a graph; after a plain loss it would drop the term.
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE)
        plan: Plan = ctx.plan
        saved: _Saved = tree_unflatten(ctx.saved_tensors, ctx.layout)
        student, dtype = saved.student, saved.statistics.diagonal_B.dtype
        wants = ctx.needs_input_grad[:3]
        with full_precision(student.image.device):
            share = student.text.new_empty((0, student.text.shape[1]), dtype=dtype) if wants[1] else None
            sweep = _sweep(student, saved.teachers, plan, share, saved.columns)
            pull = Pull.of(grad_kd, grad_hard, plan.temperature)
            found = _gradients(student, saved.teachers, saved.statistics, sweep, pull, plan, wants)
            # times W: the mean that data parallelism takes over ranks then gives the gradient of the global loss
            factor = pull.unit * (plan.ranks.world / (2 * len(saved.statistics.columns.max_a) * SLOPE_GAIN))
            length = factor * student.scale.to(dtype)
            image = None if found.image_BD is None else found.image_BD.mul_(length).to(student.image.dtype)
            text = None if found.text_BD is None else found.text_BD.mul_(length).to(student.text.dtype)
            scale = None if found.scale is None else (found.scale * factor).to(student.scale.dtype)
        return image, text, scale, None, None


def stripe(student: Towers, teachers: tuple[Towers, ...], plan: Plan) -> SimilarityLoss:
    """See `similarity_kd`."""
    if not teachers:
        plan = plan._replace(temperature=1.0)  # the hard part's own; the KD part, which is not asked for, would be the only one to differ
    return SimilarityLoss(*_SimilarityLoss.apply(*student, teachers, plan))
