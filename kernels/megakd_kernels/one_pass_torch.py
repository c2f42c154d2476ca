"""What the single-pass losses do to a panel of logits between two products, in plain torch; `triton.one_pass` does it in one kernel.

Legend: B local rows, M columns of a block, D width, c rows of a panel, K teachers. a student logits, b_k teacher logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megakd_kernels.panels import Logits, chunks, spare_panels


def half_gain(dtype: torch.dtype) -> float:
    """The factor on slopes, at most 1 in size, where embeddings are in `dtype`: keeps them above float16's 6e-8 as they are cast. Exact."""
    return 2.0**14 if dtype == torch.float16 else 1.0


class Weighed(NamedTuple):
    """One panel of softmax weights. The own pair of a row takes no part in any of it, except `own_c`.

    top_c: largest logit so far. sum_c: sum of exp(a - top_c) over this panel. weights_cM: half_gain * exp(a - top_c), 0 at the own pair,
    in a dtype that the products take; None where not wanted. own_c: a of the own pair; None where its column is elsewhere.
    """

    rows: slice
    own_c: Tensor | None
    top_c: Tensor
    sum_c: Tensor
    weights_cM: Tensor | None


class Biased(NamedTuple):
    """logits + bias, the bias of shape () in the logits' dtype."""

    logits: Logits
    bias: Tensor

    def rows(self, wanted: slice, out: Tensor) -> Tensor:
        return self.logits.rows(wanted, out).add_(self.bias)


class Part(NamedTuple):
    """One part of a sigmoid loss over one panel: the rows' sums of the loss and of its slope d loss / da, and half_gain * slope.

    slope_cM is in a dtype that the products take; with total_c None where not wanted. Both lack the factor 1 / N, as does loss_c.
    """

    loss_c: Tensor
    total_c: Tensor | None
    slope_cM: Tensor | None


class Elementwise(Protocol):
    """Both go panel by panel through the rows; each panel may reuse the memory of the one before.

    diagonal: column `row + diagonal` holds a row's own pair; None: it is in another block.
    """

    def weigh(self, logits: Logits, diagonal: int | None, top_B: Tensor, slopes: bool) -> Iterator[Weighed]:
        """top_B: the largest logit of each row in the blocks before, the lowest finite number at first."""

    def judge(
        self, student: Biased, teachers: Sequence[Biased], diagonal: int | None, hard: bool, slopes: bool
    ) -> Iterator[tuple[slice, tuple[Part, ...]]]:
        """The parts are KD where there is a teacher, then SigLIP's loss where `hard`."""


def own_pairs(panel_cM: Tensor, diagonal: int, start: int) -> Tensor:
    """(c,) view of the own pairs in the panel that begins at row `start`."""
    return panel_cM.diagonal(diagonal + start)


def _factor(slope_cM: Tensor, logits: Logits) -> Tensor:
    gain = half_gain(logits.left_BD.dtype)
    return (slope_cM if gain == 1 else slope_cM.mul_(gain)).to(logits.right_ND.dtype)


class Torch(NamedTuple):
    """`Elementwise` on any device. chunk: rows of a panel."""

    chunk: int

    def weigh(self, logits: Logits, diagonal: int | None, top_B: Tensor, slopes: bool) -> Iterator[Weighed]:
        (panel,) = spare_panels(1, self.chunk, logits)
        for rows in chunks(len(logits.left_BD), self.chunk):
            a_cM = logits.rows(rows, panel)
            own_c = None
            if diagonal is not None:
                own = own_pairs(a_cM, diagonal, rows.start)
                own_c = own.clone()
                own.fill_(-torch.inf)
            top_c = torch.maximum(a_cM.amax(1), top_B[rows])
            sum_c = a_cM.sub_(top_c[:, None]).exp_().sum(1)
            yield Weighed(rows, own_c, top_c, sum_c, _factor(a_cM, logits) if slopes else None)

    def judge(
        self, student: Biased, teachers: Sequence[Biased], diagonal: int | None, hard: bool, slopes: bool
    ) -> Iterator[tuple[slice, tuple[Part, ...]]]:
        spare = spare_panels(8 if teachers else 4, self.chunk, student.logits)
        for rows in chunks(len(student.logits.left_BD), self.chunk):
            a_cM, rest_cM, sigmoid_cM, slope_cM, *work = (panel[: rows.stop - rows.start] for panel in spare)
            student.rows(rows, a_cM)
            _softplus_of_minus(torch.abs(a_cM, out=rest_cM))
            torch.sigmoid(a_cM, out=sigmoid_cM)
            parts: list[Part] = []
            if teachers:
                loss_c = _teach(a_cM, rest_cM, [(teacher, rows) for teacher in teachers], slope_cM, work)
                slope_cM.div_(-len(teachers)).add_(sigmoid_cM)
                parts.append(Part(loss_c, slope_cM.sum(1), _factor(slope_cM, student.logits)) if slopes else Part(loss_c, None, None))
            if hard:
                loss_c = _siglip(a_cM, rest_cM, sigmoid_cM, diagonal, rows.start)
                parts.append(Part(loss_c, sigmoid_cM.sum(1), _factor(sigmoid_cM, student.logits)) if slopes else Part(loss_c, None, None))
            yield rows, tuple(parts)


def _softplus_of_minus(size_cM: Tensor) -> Tensor:
    """softplus(-size) in place, exact to the last digits however small it is: N of these are summed for each pair."""
    return size_cM.neg_().exp_().log1p_()


def _teach(a_cM: Tensor, rest_cM: Tensor, teachers: Sequence[tuple[Biased, slice]], target_cM: Tensor, work: Sequence[Tensor]) -> Tensor:
    """(c,) sums of the mean over teachers of KL(Bernoulli(sigmoid b) || Bernoulli(sigmoid a)); target_cM becomes the sum of sigmoid(b).

    softplus(a) - softplus(b) - sigmoid(b) (a - b) cancels where both are large and positive; the same with both signs turned does not.
    So each b is looked at from below 0: with x = -a sign(b), y = -|b| all terms are small where the result is.
    rest_cM: softplus(-|a|). x = max(x, 0) - max(-x, 0) leaves softplus(x) = max(x, 0) + softplus(-|a|).
    """
    target_cM.zero_()
    loss_c = a_cM.new_zeros(len(a_cM))
    one = a_cM.new_ones(())
    b_cM, side_cM, lean_cM, share_cM = work
    for teacher, rows in teachers:
        teacher.rows(rows, b_cM)
        target_cM.add_(torch.sigmoid(b_cM, out=side_cM))
        torch.copysign(one, b_cM, out=side_cM).mul_(a_cM)  # -x
        torch.sub(b_cM.abs_(), side_cM, out=lean_cM)  # x - y
        torch.sigmoid(b_cM.neg_(), out=share_cM)
        lean_cM.mul_(share_cM).add_(side_cM.clamp_max_(0))  # sigmoid(y) (x - y) - max(x, 0)
        lean_cM.add_(b_cM.exp_().log1p_().sub_(rest_cM))
        loss_c -= lean_cM.sum(1)
    return loss_c / len(teachers)


def _siglip(a_cM: Tensor, rest_cM: Tensor, sigmoid_cM: Tensor, diagonal: int | None, start: int) -> Tensor:
    """(c,) sums of softplus(-z a). sigmoid_cM, at first sigmoid(a), becomes the slope. rest_cM, softplus(-|a|), and a_cM are used up.

    The own pairs go by themselves: sigmoid(a) - 1 and softplus(a) - a have no correct digit left where a pair is well matched.
    """
    if diagonal is None:
        return rest_cM.add_(a_cM.clamp_min_(0)).sum(1)
    own_c, own_rest_c = (own_pairs(panel_cM, diagonal, start) for panel_cM in (a_cM, rest_cM))
    own_pairs(sigmoid_cM, diagonal, start).copy_(-torch.sigmoid(-own_c))
    own_loss_c = own_rest_c + (-own_c).clamp_min(0)
    rest_cM.add_(a_cM.clamp_min_(0))
    own_rest_c.copy_(own_loss_c)
    return rest_cM.sum(1)
