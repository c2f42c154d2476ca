"""The two passes in plain torch, one panel of logits after the other: any device, any floating dtype.

Legend: B rows of this rank, M columns of a block, D width, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.panels import Logits, chunks, scratch_panels
from megakd_kernels.softmax_stats import SlopeWeights, SoftmaxStats, join, merge, panel_stats
from megakd_kernels.two_pass import StripeLogits


class TorchTwoPass(NamedTuple):
    """`TwoPassKernels` on any device. chunk: rows of logits held at a time."""

    chunk: int

    def logits(self, left_BD: Tensor, right_MD: Tensor, gain: Tensor) -> Logits:
        return Logits.of(left_BD, right_MD, gain)

    def statistics(self, logits: StripeLogits, hard_temperature: float | None) -> tuple[SoftmaxStats, SoftmaxStats, Tensor | None]:
        row_parts: list[SoftmaxStats] = []
        diagonal_parts: list[Tensor] = []
        columns: SoftmaxStats | None = None
        scratch = scratch_panels(5 if logits.teachers else 3, self.chunk, logits.student)
        for rows in chunks(len(logits.student.left_BD), self.chunk):
            a_cM = logits.student.rows(rows, scratch[-1])
            if logits.diagonal is not None:
                diagonal_parts.append(a_cM.diagonal(logits.diagonal + rows.start).clone())
            teacher_panels = (teacher.rows(rows, scratch[-2]) for teacher in logits.teachers)
            of_rows, of_columns = panel_stats(a_cM, teacher_panels, hard_temperature, scratch)
            row_parts.append(of_rows)
            columns = of_columns if columns is None else merge(columns, of_columns, hard_temperature)
        assert columns is not None
        return join(row_parts), columns, torch.cat(diagonal_parts) if diagonal_parts else None

    def slopes(
        self, logits: StripeLogits, sides: tuple[SlopeWeights, SlopeWeights], hard_temperature: float | None, diagonal_weight: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        rows, columns = sides
        scratch = scratch_panels(3, self.chunk, logits.student)
        for panel in chunks(len(logits.student.left_BD), self.chunk):
            slope_cM = _slope(logits, panel, (rows.lines(panel), columns), hard_temperature, scratch)
            if logits.diagonal is not None:
                slope_cM.diagonal(logits.diagonal + panel.start).sub_(diagonal_weight)
            yield panel, slope_cM.to(logits.student.right_ND.dtype)


def _slope(
    logits: StripeLogits, rows: slice, sides: tuple[SlopeWeights, SlopeWeights], hard_temperature: float | None, scratch: Sequence[Tensor]
) -> Tensor:
    """The softmaxes of both sides, summed, in the first of three scratch panels."""
    slope_cM, work_cM = (panel[: rows.stop - rows.start] for panel in scratch[:2])
    slope_cM.zero_()
    a_cM = logits.student.rows(rows, scratch[2])
    for side, dim in zip(sides, (1, 0), strict=True):
        _add_softmax(slope_cM, a_cM, side.m_a, side.student, dim, 1.0, work_cM)
        if side.hard is not None and hard_temperature is not None:
            _add_softmax(slope_cM, a_cM, side.m_a, side.hard, dim, hard_temperature, work_cM)
    for number, teacher in enumerate(logits.teachers):
        b_cM = teacher.rows(rows, scratch[2])
        for side, dim in zip(sides, (1, 0), strict=True):
            assert side.m_b is not None
            assert side.teacher is not None
            _add_softmax(slope_cM, b_cM, side.m_b[number], side.teacher[number], dim, 1.0, work_cM)
    return slope_cM


def _add_softmax(slope_cM: Tensor, logits_cM: Tensor, m: Tensor, weight: Tensor, dim: int, temperature: float, work_cM: Tensor) -> None:
    """slope += weight * exp(temperature * (logits - m)); m and weight hold a number a line, rows at dim 1, columns at dim 0."""
    shifted_cM = torch.sub(logits_cM, m.unsqueeze(dim), out=work_cM)
    if temperature != 1:
        shifted_cM.mul_(temperature)
    slope_cM.addcmul_(shifted_cM.exp_(), weight.unsqueeze(dim))
