"""The similarity losses' passes in plain torch, one panel of logits after the other: any device, any floating dtype.

Legend: B local rows, M columns of a block, D width, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.panels import Logits, chunks, spare_panels
from megakd_kernels.softmax_stats import Normalisers, Softmaxes, join, merge, summarise
from megakd_kernels.two_pass import Matrices


class Chunked(NamedTuple):
    """`two_pass.Kernels`. chunk: rows of logits held at a time."""

    chunk: int

    def logits(self, left_BD: Tensor, right_MD: Tensor, gain: Tensor) -> Logits:
        return Logits.of(left_BD, right_MD, gain)

    def statistics(self, matrices: Matrices, sharpen: float | None) -> tuple[Normalisers, Normalisers, Tensor | None]:
        rows: list[Normalisers] = []
        diagonal: list[Tensor] = []
        columns: Normalisers | None = None
        spare = spare_panels(5 if matrices.teachers else 3, self.chunk, matrices.student)
        for wanted in chunks(len(matrices.student.left_BD), self.chunk):
            a_cM = matrices.student.rows(wanted, spare[-1])
            if matrices.diagonal is not None:
                diagonal.append(a_cM.diagonal(matrices.diagonal + wanted.start).clone())
            targets = (teacher.rows(wanted, spare[-2]) for teacher in matrices.teachers)
            of_rows, share = summarise(a_cM, targets, sharpen, spare)
            rows.append(of_rows)
            columns = share if columns is None else merge(columns, share, sharpen)
        assert columns is not None
        return join(rows), columns, torch.cat(diagonal) if diagonal else None

    def slopes(
        self, matrices: Matrices, sides: tuple[Softmaxes, Softmaxes], sharpen: float | None, own_pair: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        rows, columns = sides
        spare = spare_panels(3, self.chunk, matrices.student)
        for wanted in chunks(len(matrices.student.left_BD), self.chunk):
            slope_cM = _slope(matrices, wanted, (rows.lines(wanted), columns), sharpen, spare)
            if matrices.diagonal is not None:
                slope_cM.diagonal(matrices.diagonal + wanted.start).sub_(own_pair)
            yield wanted, slope_cM.to(matrices.student.right_ND.dtype)


def _slope(matrices: Matrices, wanted: slice, sides: tuple[Softmaxes, Softmaxes], sharpen: float | None, spare: Sequence[Tensor]) -> Tensor:
    """The softmaxes of both sides, summed, in the first of three spare panels."""
    slope_cM, work_cM = (panel[: wanted.stop - wanted.start] for panel in spare[:2])
    slope_cM.zero_()
    logits_cM = matrices.student.rows(wanted, spare[2])
    for side, dim in zip(sides, (1, 0), strict=True):
        _add_softmax(slope_cM, logits_cM, side.top_a, side.soft, dim, 1.0, work_cM)
        if side.hard is not None and sharpen is not None:
            _add_softmax(slope_cM, logits_cM, side.top_a, side.hard, dim, sharpen, work_cM)
    for place, teacher in enumerate(matrices.teachers):
        logits_cM = teacher.rows(wanted, spare[2])
        for side, dim in zip(sides, (1, 0), strict=True):
            assert side.top_b is not None
            assert side.teach is not None
            _add_softmax(slope_cM, logits_cM, side.top_b[place], side.teach[place], dim, 1.0, work_cM)
    return slope_cM


def _add_softmax(slope_cM: Tensor, logits_cM: Tensor, top: Tensor, weight: Tensor, dim: int, sharpen: float, spare_cM: Tensor) -> None:
    """slope += weight * exp(sharpen * (logits - top)); top and weight hold a number a line, rows at dim 1, columns at dim 0."""
    below_cM = torch.sub(logits_cM, top.unsqueeze(dim), out=spare_cM)
    if sharpen != 1:
        below_cM.mul_(sharpen)
    slope_cM.addcmul_(below_cM.exp_(), weight.unsqueeze(dim))
