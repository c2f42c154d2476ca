"""Online softmax statistics of student and teacher logits along the rows or the columns of the similarity matrix, and the weights of the
softmaxes in the gradient that follow from them.

Legend: c rows of a chunk, M columns, n lines (c rows or M columns), K teachers, P parts of the logits.
a student logits, b_k teacher logits, both already divided by the temperature. m maximum, l sum of exp(logit - m).
The hard part (InfoNCE at temperature 1) needs a sum of its own where the temperature is not 1: its logits are hard_temperature * a.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.distributed import Ranks

# The slope (d loss / d logits) is cast to half precision where the product takes halves. Its entries are at most 8, mostly near 1 / N:
# this gain keeps them inside float16 (8 * 2^12 < 65504, and 2^-24 / 2^12 is far below 1 / N). Exact in every other dtype.
SLOPE_GAIN = 2.0**12


def _present(field: Tensor | None) -> Tensor:
    """A field that the caller knows to be there."""
    assert field is not None
    return field


class SoftmaxStats(NamedTuple):
    """The statistics of n lines over the logits seen so far.

    m_a, l_a: (n,). l_hard: (n,), sum of exp(hard_temperature * (a - m_a)); None where l_a is that sum already.
    m_b, l_b: (K, n), of each teacher; None without one.
    cross_term: (K, n), sum of exp(b - m_b) * ((b - m_b) - (a - m_a)). Centred on both maxima, unlike the textbook's sum of (b - a):
        logits of 2000 (scale 100, temperature 0.05) would otherwise leave their rounding of 1e-4 in the divergence.

    All formulas hold for any other reference in place of the maxima, as long as the sums neither overflow nor vanish.
    """

    m_a: Tensor
    l_a: Tensor
    l_hard: Tensor | None
    m_b: Tensor | None
    l_b: Tensor | None
    cross_term: Tensor | None

    def divergence(self) -> Tensor:
        """(n,), the mean over teachers of KL(teacher || student); exactly 0 where every b_k and a are the same numbers."""
        l_b = _present(self.l_b)
        # Not log(l_a / l_b): with references other than the maxima the quotient can underflow to 0.
        return (_present(self.cross_term) / l_b + (self.l_a.log() - l_b.log())).mean(0)

    def infonce(self, diagonal_n: Tensor, hard_temperature: float | None) -> Tensor:
        """(n,), logsumexp of the line less its diagonal logit, at temperature 1. diagonal_n: the a of the diagonal."""
        shifted_n = self.m_a - diagonal_n
        if hard_temperature is None:
            return shifted_n + self.l_a.log()
        return shifted_n * hard_temperature + _present(self.l_hard).log()

    def lines(self, selected: slice) -> SoftmaxStats:
        return SoftmaxStats(*(None if field is None else field[..., selected] for field in self))  # type: ignore[arg-type]


def panel_stats(
    a_cM: Tensor, teacher_panels: Iterable[Tensor], hard_temperature: float | None, scratch: Sequence[Tensor]
) -> tuple[SoftmaxStats, SoftmaxStats]:
    """The statistics of one panel's rows, complete where it spans all columns, and of its columns, to be merged. Overwrites a_cM.

    teacher_panels: one at a time; each may reuse the memory of the one before.
    scratch: three panels of at least c rows; two are enough without a teacher.
    """
    scratch = [panel[: len(a_cM)] for panel in scratch]
    m_a = [a_cM.amax(dim, keepdim=True) for dim in (1, 0)]
    shifted_a = [torch.sub(a_cM, m_a[0], out=scratch[0]), a_cM.sub_(m_a[1])]
    l_a = [torch.exp(shifted_a[side], out=scratch[1]).sum(1 - side) for side in (0, 1)]
    l_hard: list[Tensor | None] = [None, None]
    if hard_temperature is not None:
        l_hard = [torch.mul(shifted_a[side], hard_temperature, out=scratch[1]).exp_().sum(1 - side) for side in (0, 1)]
    of_teachers: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], []]
    for b_cM in teacher_panels:
        for side, dim in ((0, 1), (1, 0)):
            m_b = b_cM.amax(dim, keepdim=True)
            shifted_b = torch.sub(b_cM, m_b, out=scratch[1])
            exp_b = torch.exp(shifted_b, out=scratch[2])
            of_teachers[side].append((m_b.squeeze(dim), exp_b.sum(dim), shifted_b.sub_(shifted_a[side]).mul_(exp_b).sum(dim)))
    stats = []
    for side in (0, 1):
        of_b: list[Tensor | None] = [torch.stack(field) for field in zip(*of_teachers[side], strict=True)] or [None] * 3
        stats.append(SoftmaxStats(m_a[side].squeeze(1 - side), l_a[side], l_hard[side], *of_b))
    return stats[0], stats[1]


def join(parts: Sequence[SoftmaxStats]) -> SoftmaxStats:
    """The statistics of different lines, one part after the other."""
    return SoftmaxStats(*(None if fields[0] is None else torch.cat(fields, -1) for fields in zip(*parts, strict=True)))  # type: ignore[arg-type]


def merge(parts: Sequence[SoftmaxStats], hard_temperature: float | None) -> SoftmaxStats:
    """The statistics of the same lines over the union of disjoint sets of logits, summed in their order. O(n) each."""
    if len(parts) == 1:
        return parts[0]
    m_a_Pn = torch.stack([part.m_a for part in parts])
    m_a = m_a_Pn.amax(0)
    deltas_a_Pn = m_a_Pn - m_a
    l_a = _sum([part.l_a for part in parts], deltas_a_Pn.exp())
    l_hard = None
    if hard_temperature is not None:
        l_hard = _sum([_present(part.l_hard) for part in parts], (deltas_a_Pn * hard_temperature).exp())
    if parts[0].m_b is None:
        return SoftmaxStats(m_a, l_a, l_hard, None, None, None)
    m_b_PKn = torch.stack([_present(part.m_b) for part in parts])
    m_b = m_b_PKn.amax(0)
    deltas_b_PKn = m_b_PKn - m_b
    alphas_b_PKn = deltas_b_PKn.exp()
    l_b_PKn = torch.stack([_present(part.l_b) for part in parts])
    cross_term_PKn = torch.stack([_present(part.cross_term) for part in parts]) + l_b_PKn * (deltas_b_PKn - deltas_a_Pn[:, None])
    return SoftmaxStats(m_a, l_a, l_hard, m_b, (l_b_PKn * alphas_b_PKn).sum(0), (cross_term_PKn * alphas_b_PKn).sum(0))


def _sum(parts: Sequence[Tensor], weights_Pn: Tensor) -> Tensor:
    return (torch.stack(list(parts)) * weights_Pn).sum(0)


def merge_over_ranks(local: SoftmaxStats, ranks: Ranks, hard_temperature: float | None) -> SoftmaxStats:
    """The columns' statistics over the rows of all ranks: gathered in one message, merged in rank order, equal on every rank."""
    if ranks.world == 1:
        return local
    shapes = [None if field is None else field.shape for field in local]
    flat_1F = torch.cat([field.flatten() for field in local if field is not None])[None]
    parts: list[SoftmaxStats] = []
    for flat_F in ranks.gather(flat_1F).unbind(0):
        fields = iter(flat_F.split([shape.numel() for shape in shapes if shape is not None]))
        parts.append(SoftmaxStats(*(None if shape is None else next(fields).view(shape) for shape in shapes)))  # type: ignore[arg-type]
    return merge(parts, hard_temperature)


class UpstreamGradients(NamedTuple):
    """The upstream gradients of the two losses, divided by `unit` so that each is at most 1 in size; kd includes the temperature."""

    kd: Tensor
    hard: Tensor
    unit: Tensor

    @classmethod
    def of(cls, grad_kd: Tensor, grad_hard: Tensor, temperature: float) -> UpstreamGradients:
        kd = grad_kd * temperature
        unit = torch.maximum(kd.abs(), grad_hard.abs()).clamp_min(torch.finfo(kd.dtype).tiny)
        return cls(kd / unit, grad_hard / unit, unit)


class SlopeWeights(NamedTuple):
    """What one side adds to SLOPE_GAIN * slope at a line:

    student * exp(a - m_a) + hard * exp(hard_temperature * (a - m_a)) + sum over k of teacher_k * exp(b_k - m_b_k).

    m_a, student: (n,). hard: (n,), or None where `student` covers it. m_b, teacher: (K, n), or None without one; teacher is negative.
    """

    m_a: Tensor
    student: Tensor
    hard: Tensor | None
    m_b: Tensor | None
    teacher: Tensor | None

    @classmethod
    def of(cls, stats: SoftmaxStats, upstream: UpstreamGradients, direction: float) -> SlopeWeights:
        """direction: the weight of this side, 1 where rows and columns count alike."""
        kd, hard = upstream.kd * (direction * SLOPE_GAIN), upstream.hard * (direction * SLOPE_GAIN)
        own_hard = None if stats.l_hard is None else hard / stats.l_hard
        student = (kd + hard if own_hard is None else kd) / stats.l_a
        if stats.l_b is None:
            return cls(stats.m_a, student, own_hard, None, None)
        return cls(stats.m_a, student, own_hard, stats.m_b, -kd / (len(stats.l_b) * stats.l_b))

    def lines(self, selected: slice) -> SlopeWeights:
        return SlopeWeights(*(None if field is None else field[..., selected] for field in self))  # type: ignore[arg-type]

    def moved(self, m_a: Tensor, m_b: Tensor | None, hard_temperature: float | None) -> SlopeWeights:
        """The same terms written with one reference for all lines in place of each one's own. m_a: (); m_b: (K,)."""
        by_a = m_a - self.m_a
        hard = None if self.hard is None or hard_temperature is None else self.hard * (by_a * hard_temperature).exp()
        student = self.student * by_a.exp()
        if self.m_b is None or self.teacher is None or m_b is None:
            return SlopeWeights(m_a.expand_as(self.m_a), student, hard, None, None)
        m_b_Kn = m_b[:, None].expand_as(self.m_b)
        return SlopeWeights(m_a.expand_as(self.m_a), student, hard, m_b_Kn, self.teacher * (m_b_Kn - self.m_b).exp())
