"""The similarity losses' passes by Triton kernels: statistics without logits in memory, slopes as panels in the embeddings' own dtype.

Legend: B local rows, M columns of a block, D width, c rows of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.panels import Logits, chunks
from megakd_kernels.softmax_stats import Normalisers, Softmaxes
from megakd_kernels.triton.slope import slope_panel
from megakd_kernels.triton.statistics import STATIC_LIMIT, stripe_statistics
from megakd_kernels.two_pass import Matrices

# One slope panel. NOT measured on a GPU yet: 256 MB are 4096 rows of bfloat16 at N = 32768, enough to fill the matrix units.
PANEL_BYTES = 256 << 20


class Fused(NamedTuple):
    """`two_pass.Kernels`. chunk: rows of a slope panel. static: the logits are known to stay within `STATIC_LIMIT`."""

    chunk: int
    static: bool

    @classmethod
    def of(cls, rows: int, columns: int, chunk: int | None, bound: float | None) -> Fused:
        """bound: what no logit over the temperature exceeds in size; None where that is unknown."""
        fitting = max(1, min(rows, PANEL_BYTES // (columns * torch.bfloat16.itemsize)))
        return cls(chunk or fitting, bound is not None and bound <= STATIC_LIMIT)

    def logits(self, left_BD: Tensor, right_MD: Tensor, gain: Tensor) -> Logits:
        return Logits(left_BD, right_MD, gain)

    def statistics(self, matrices: Matrices, sharpen: float | None) -> tuple[Normalisers, Normalisers, Tensor | None]:
        # The normaliser at temperature 1 spans `sharpen` times the range: one offset cannot serve both.
        static = self.static and sharpen is None
        return stripe_statistics(matrices.student, matrices.teachers, sharpen, diagonal=matrices.diagonal, static=static)

    def slopes(
        self, matrices: Matrices, sides: tuple[Softmaxes, Softmaxes], sharpen: float | None, own_pair: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        rows, columns = sides
        left_BD, right_MD, _ = matrices.student
        panel_cM = right_MD.new_empty((min(self.chunk, len(left_BD)), len(right_MD)))
        for wanted in chunks(len(left_BD), self.chunk):
            slope_cM = panel_cM[: wanted.stop - wanted.start]
            slope_panel(
                matrices.student._replace(left_BD=left_BD[wanted]),
                [teacher._replace(left_BD=teacher.left_BD[wanted]) for teacher in matrices.teachers],
                rows.lines(wanted),
                columns,
                sharpen=sharpen,
                diagonal=None if matrices.diagonal is None else matrices.diagonal + wanted.start,
                diagonal_weight=own_pair,
                out_cM=slope_cM,
            )
            yield wanted, slope_cM
