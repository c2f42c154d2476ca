"""Online softmax statistics of student and teacher logits, along the rows or the columns of the similarity matrix.

Legend: c rows of a chunk, N columns, n the lines that are summarised (c rows or N columns).
a student logits, b teacher logits, both already divided by the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.ranks import Ranks


def _held(field: Tensor | None) -> Tensor:
    """A field that the caller knows to be there."""
    assert field is not None
    return field


class Normalisers(NamedTuple):
    """What one line (a row or a column) needs to know about the logits seen so far. Every field is (n,).

    max_a, sum_a: largest a; sum of exp(a - max_a).
    sum_hard: sum of exp(temperature * (a - max_a)), the normaliser at temperature 1; None where sum_a already is it.
    max_b, sum_b: the same of b; None without a teacher.
    gap: sum of exp(b - max_b) * ((b - max_b) - (a - max_a)). Centred on both maxima, unlike the textbook sum of (b - a):
        logits of 2000 (scale 100, temperature 0.05) would otherwise leave their rounding of 1e-4 in the divergence.
    """

    max_a: Tensor
    sum_a: Tensor
    sum_hard: Tensor | None
    max_b: Tensor | None
    sum_b: Tensor | None
    gap: Tensor | None

    def divergence(self) -> Tensor:
        """KL(teacher || student) of each line; exactly 0 where a and b are the same numbers."""
        sum_b = _held(self.sum_b)
        return _held(self.gap) / sum_b + torch.log(self.sum_a / sum_b)

    def infonce(self, diagonal_n: Tensor, sharpen: float | None) -> Tensor:
        """-log softmax of the diagonal at temperature 1 of each line; diagonal_n holds its a."""
        below_n = self.max_a - diagonal_n
        if sharpen is None:
            return below_n + self.sum_a.log()
        return below_n * sharpen + _held(self.sum_hard).log()

    def lines(self, wanted: slice) -> Normalisers:
        return Normalisers(*(None if field is None else field[wanted] for field in self))  # type: ignore[arg-type]


def summarise(a_cN: Tensor, b_cN: Tensor | None, dim: int, sharpen: float | None, spare: Sequence[Tensor]) -> Normalisers:
    """The statistics of one panel along `dim`: 1 finishes its rows, 0 gives its share of the columns.

    sharpen: the temperature, where the normaliser at temperature 1 is wanted besides; otherwise None.
    spare: three panels to work in, of at least c rows; two are enough without a teacher.
    """
    spare = [panel[: len(a_cN)] for panel in spare]
    top_a = a_cN.amax(dim, keepdim=True)
    below_a = torch.sub(a_cN, top_a, out=spare[0])
    sum_hard = None if sharpen is None else torch.mul(below_a, sharpen, out=spare[1]).exp_().sum(dim)
    max_a = top_a.squeeze(dim)
    if b_cN is None:
        return Normalisers(max_a, below_a.exp_().sum(dim), sum_hard, None, None, None)
    top_b = b_cN.amax(dim, keepdim=True)
    below_b = torch.sub(b_cN, top_b, out=spare[1])
    weight = torch.exp(below_b, out=spare[2])
    gap = below_b.sub_(below_a).mul_(weight).sum(dim)
    return Normalisers(max_a, below_a.exp_().sum(dim), sum_hard, top_b.squeeze(dim), weight.sum(dim), gap)


def join(parts: Sequence[Normalisers]) -> Normalisers:
    """The statistics of different lines, one part after the other."""
    return Normalisers(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True)))  # type: ignore[arg-type]


def merge(left: Normalisers, right: Normalisers, sharpen: float | None) -> Normalisers:
    """Statistics of the same lines over the union of two disjoint sets of logits. O(n)."""
    max_a = torch.maximum(left.max_a, right.max_a)
    sides = (left, right)
    drop_a = [side.max_a - max_a for side in sides]
    sum_a = left.sum_a * drop_a[0].exp() + right.sum_a * drop_a[1].exp()
    sum_hard = None
    if sharpen is not None:
        sum_hard = _held(left.sum_hard) * (drop_a[0] * sharpen).exp() + _held(right.sum_hard) * (drop_a[1] * sharpen).exp()
    if left.max_b is None or right.max_b is None:
        return Normalisers(max_a, sum_a, sum_hard, None, None, None)
    max_b = torch.maximum(left.max_b, right.max_b)
    sum_b, gap = torch.zeros_like(max_b), torch.zeros_like(max_b)
    for side, fall_a in zip(sides, drop_a, strict=True):
        fall_b = _held(side.max_b) - max_b
        fade = fall_b.exp()
        sum_b = sum_b + _held(side.sum_b) * fade
        gap = gap + (_held(side.gap) + _held(side.sum_b) * (fall_b - fall_a)) * fade
    return Normalisers(max_a, sum_a, sum_hard, max_b, sum_b, gap)


def merge_over_ranks(mine: Normalisers, ranks: Ranks, sharpen: float | None) -> Normalisers:
    """The columns' statistics over the rows of all ranks: gathered in one message, merged in rank order, equal on every rank."""
    if ranks.world == 1:
        return mine
    present = [field is not None for field in mine]
    stacked_1KN = torch.stack([field for field in mine if field is not None])[None]
    merged: Normalisers | None = None
    for fields_KN in ranks.gather(stacked_1KN).unbind(0):
        fields = iter(fields_KN.unbind(0))
        theirs = Normalisers(*(next(fields) if there else None for there in present))  # type: ignore[arg-type]
        merged = theirs if merged is None else merge(merged, theirs, sharpen)
    assert merged is not None
    return merged
