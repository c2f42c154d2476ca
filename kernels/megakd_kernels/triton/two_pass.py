"""The two passes by Triton kernels: statistics without logits in memory, slopes as panels in the embeddings' own dtype.

Legend: B rows of this rank, M columns of a block, D width, c rows of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.panels import Logits, chunks
from megakd_kernels.softmax_stats import SlopeWeights, SoftmaxStats
from megakd_kernels.triton.slope import slope_panel
from megakd_kernels.triton.statistics import STATIC_LIMIT, stripe_statistics
from megakd_kernels.two_pass import Kept, StripeLogits

# Bytes of a slope panel. NOT measured on a GPU yet: 256 MB are 4096 rows of bfloat16 at N = 32768, enough to fill the matrix units.
PANEL_BYTES = 256 << 20


class TritonTwoPass(NamedTuple):
    """`TwoPassKernels` on CUDA. chunk: rows of a slope panel. static: no |logit| exceeds `STATIC_LIMIT`."""

    chunk: int
    static: bool

    @classmethod
    def of(cls, rows: int, columns: int, chunk: int | None, bound: float | None) -> TritonTwoPass:
        """bound: what no |logit| over the temperature exceeds; None where that is unknown."""
        rows_that_fit = max(1, min(rows, PANEL_BYTES // (columns * torch.bfloat16.itemsize)))
        return cls(chunk or rows_that_fit, bound is not None and bound <= STATIC_LIMIT)

    def logits(self, left_BD: Tensor, right_MD: Tensor, gain: Tensor) -> Logits:
        return Logits(left_BD, right_MD, gain)

    def statistics(
        self, logits: StripeLogits, hard_temperature: float | None, keep: bool
    ) -> tuple[SoftmaxStats, SoftmaxStats, Tensor | None, Kept]:
        del keep  # no logits are ever in memory
        # The sum at temperature 1 spans `hard_temperature` times the range: one offset cannot serve both.
        static = self.static and hard_temperature is None
        return *stripe_statistics(logits.student, logits.teachers, hard_temperature, diagonal=logits.diagonal, static=static), ()

    def slopes(
        self,
        logits: StripeLogits,
        sides: tuple[SlopeWeights, SlopeWeights],
        hard_temperature: float | None,
        diagonal_weight: Tensor,
        kept: Kept,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        rows, columns = sides
        left_BD, right_MD, _ = logits.student
        panel_cM = right_MD.new_empty((min(self.chunk, len(left_BD)), len(right_MD)))
        for panel in chunks(len(left_BD), self.chunk):
            slope_cM = panel_cM[: panel.stop - panel.start]
            slope_panel(
                logits.student._replace(left_BD=left_BD[panel]),
                [teacher._replace(left_BD=teacher.left_BD[panel]) for teacher in logits.teachers],
                rows.lines(panel),
                columns,
                hard_temperature=hard_temperature,
                diagonal=None if logits.diagonal is None else logits.diagonal + panel.start,
                diagonal_weight=diagonal_weight,
                out_cM=slope_cM,
            )
            yield panel, slice(len(right_MD)), slope_cM
