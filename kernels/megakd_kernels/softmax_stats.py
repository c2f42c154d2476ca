"""Online softmax statistics of student and teacher logits along the rows or the columns of the similarity matrix, and the softmaxes of the
slope that follow from them.

Legend: c rows of a chunk, M columns, n the lines that are summarised (c rows or M columns), K teachers.
a student logits, b_k teacher logits, both already divided by the temperature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.distributed import Ranks


def _held(field: Tensor | None) -> Tensor:
    """A field that the caller knows to be there."""
    assert field is not None
    return field


class Normalisers(NamedTuple):
    """What one line (a row or a column) needs to know about the logits seen so far.

    max_a, sum_a: (n,), largest a; sum of exp(a - max_a).
    sum_hard: (n,), sum of exp(temperature * (a - max_a)), the normaliser at temperature 1; None where sum_a already is it.
    max_b, sum_b: (K, n), the same of each b_k; None without a teacher.
    gap: (K, n), sum of exp(b - max_b) * ((b - max_b) - (a - max_a)). Centred on both maxima, unlike the textbook sum of (b - a):
        logits of 2000 (scale 100, temperature 0.05) would otherwise leave their rounding of 1e-4 in the divergence.

    All that follows holds for any other reference in place of the maxima, as long as the sums neither overflow nor vanish.
    """

    max_a: Tensor
    sum_a: Tensor
    sum_hard: Tensor | None
    max_b: Tensor | None
    sum_b: Tensor | None
    gap: Tensor | None

    def divergence(self) -> Tensor:
        """(n,), the mean over teachers of KL(teacher || student); exactly 0 where every b_k and a are the same numbers."""
        sum_b = _held(self.sum_b)
        # Not the logarithm of the quotient: relative to references other than the maxima that can be 0.
        return (_held(self.gap) / sum_b + (self.sum_a.log() - sum_b.log())).mean(0)

    def infonce(self, diagonal_n: Tensor, sharpen: float | None) -> Tensor:
        """-log softmax of the diagonal at temperature 1 of each line; diagonal_n holds its a."""
        below_n = self.max_a - diagonal_n
        if sharpen is None:
            return below_n + self.sum_a.log()
        return below_n * sharpen + _held(self.sum_hard).log()

    def lines(self, wanted: slice) -> Normalisers:
        return Normalisers(*(None if field is None else field[..., wanted] for field in self))  # type: ignore[arg-type]


def summarise(a_cM: Tensor, targets: Iterable[Tensor], sharpen: float | None, spare: Sequence[Tensor]) -> tuple[Normalisers, Normalisers]:
    """The statistics of one panel: of its rows, finished where it spans all columns, and of its columns, a share. Overwrites a_cM.

    targets: the teachers' panels, one at a time: each may use the memory of the one before.
    sharpen: the temperature, where the normaliser at temperature 1 is wanted besides; otherwise None.
    spare: three panels to work in, of at least c rows; two are enough without a teacher.
    """
    spare = [panel[: len(a_cM)] for panel in spare]
    top = [a_cM.amax(dim, keepdim=True) for dim in (1, 0)]
    below = [torch.sub(a_cM, top[0], out=spare[0]), a_cM.sub_(top[1])]
    sums_a = [torch.exp(below[side], out=spare[1]).sum(1 - side) for side in (0, 1)]
    sums_hard: list[Tensor | None] = [None, None]
    if sharpen is not None:
        sums_hard = [torch.mul(below[side], sharpen, out=spare[1]).exp_().sum(1 - side) for side in (0, 1)]
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], []]
    for b_cM in targets:
        for side, dim in ((0, 1), (1, 0)):
            top_b = b_cM.amax(dim, keepdim=True)
            below_b = torch.sub(b_cM, top_b, out=spare[1])
            weight = torch.exp(below_b, out=spare[2])
            found[side].append((top_b.squeeze(dim), weight.sum(dim), below_b.sub_(below[side]).mul_(weight).sum(dim)))
    student = [(top[side].squeeze(1 - side), sums_a[side], sums_hard[side]) for side in (0, 1)]
    teachers: list[list[Tensor | None]] = [[torch.stack(field) for field in zip(*kept, strict=True)] or [None] * 3 for kept in found]
    return Normalisers(*student[0], *teachers[0]), Normalisers(*student[1], *teachers[1])


def join(parts: Sequence[Normalisers]) -> Normalisers:
    """The statistics of different lines, one part after the other."""
    return Normalisers(*(None if fields[0] is None else torch.cat(fields, -1) for fields in zip(*parts, strict=True)))  # type: ignore[arg-type]


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
    shapes = [None if field is None else field.shape for field in mine]
    flat_1F = torch.cat([field.flatten() for field in mine if field is not None])[None]
    merged: Normalisers | None = None
    for flat_F in ranks.gather(flat_1F).unbind(0):
        fields = iter(flat_F.split([shape.numel() for shape in shapes if shape is not None]))
        theirs = Normalisers(*(None if shape is None else next(fields).view(shape) for shape in shapes))  # type: ignore[arg-type]
        merged = theirs if merged is None else merge(merged, theirs, sharpen)
    assert merged is not None
    return merged


# Slopes are cast to half precision where the product takes halves. Their entries are at most 8, mostly near 1 / N:
# this gain keeps them inside float16 (8 * 2^12 < 65504, and 2^-24 / 2^12 is far below 1 / N). Exact in every other dtype.
SLOPE_GAIN = 2.0**12


class Pull(NamedTuple):
    """Upstream gradients as weights of the softmaxes in the slope, at most 1 in size each, and the unit taken out of them."""

    kd: Tensor
    hard: Tensor
    unit: Tensor

    @classmethod
    def of(cls, grad_kd: Tensor, grad_hard: Tensor, temperature: float) -> Pull:
        kd = grad_kd * temperature
        unit = torch.maximum(kd.abs(), grad_hard.abs()).clamp_min(torch.finfo(kd.dtype).tiny)
        return cls(kd / unit, grad_hard / unit, unit)


class Softmaxes(NamedTuple):
    """What one side adds to the slope at a line:

    soft * exp(a - top_a) + hard * exp(sharpen * (a - top_a)) + sum over k of teach_k * exp(b_k - top_b_k).

    top_a, soft: (n,). hard: (n,), or None where `soft` covers it. top_b, teach: (K, n), or None without a teacher; teach is negative.
    """

    top_a: Tensor
    soft: Tensor
    hard: Tensor | None
    top_b: Tensor | None
    teach: Tensor | None

    @classmethod
    def of(cls, lines: Normalisers, pull: Pull, direction: float) -> Softmaxes:
        """direction: the weight of this side, 1 where rows and columns count alike."""
        kd, hard = pull.kd * (direction * SLOPE_GAIN), pull.hard * (direction * SLOPE_GAIN)
        sharp = None if lines.sum_hard is None else hard / lines.sum_hard
        soft = (kd + hard if sharp is None else kd) / lines.sum_a
        if lines.sum_b is None:
            return cls(lines.max_a, soft, sharp, None, None)
        return cls(lines.max_a, soft, sharp, lines.max_b, -kd / (len(lines.sum_b) * lines.sum_b))

    def lines(self, wanted: slice) -> Softmaxes:
        return Softmaxes(*(None if field is None else field[..., wanted] for field in self))  # type: ignore[arg-type]
