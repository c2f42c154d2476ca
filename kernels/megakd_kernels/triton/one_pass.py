"""The panels of the one-pass losses with one Triton kernel between their two products.

A program owns one row, so sums need no atomics and repeat bitwise. The products are cosines: the kernels apply scale and bias, which saves
a pass over the panel. All arithmetic is in float32.

Legend: B rows of this rank, M columns of a block, D width, c rows of a panel, K teachers.
"""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,no-untyped-call"
# (Triton ships no types, and its kernels carry none)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd_kernels.one_pass import BiasedLogits, ExpPanel, SigmoidPanel, half_gain
from megakd_kernels.panels import Logits, chunks, scratch_panels

# Columns that a program holds at a time, and its warps. NOT measured on a GPU yet.
COLUMNS, WARPS = 1024, 4

# Bytes of one float32 panel; there is one for each model, and those of the slopes. NOT measured on a GPU yet: 2048 rows at N = 32768.
PANEL_BYTES = 256 << 20


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], exact to the last digits: 2 artanh(x / (2 + x)), whose argument is at most 1/3."""
    z = x / (2.0 + x)
    w = z * z
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13 + w / 15))))))
    return 2.0 * z * series


@triton.jit
def _exp_panel_kernel(
    cosine_cM,
    gain,
    previous_m_c,
    m_c,
    l_c,
    positive_c,
    exp_cM,
    columns,
    diagonal,
    half_gain,
    DIAGONAL: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_start = cosine_cM + row * columns
    scale = tl.load(gain)
    positive = row + diagonal
    offsets = tl.arange(0, BLOCK)
    m_lanes = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        columns_at = start + offsets
        counted = (columns_at < columns) & (columns_at != positive) if DIAGONAL else columns_at < columns
        a = tl.load(row_start + columns_at, mask=columns_at < columns, other=0.0) * scale
        m_lanes = tl.maximum(m_lanes, tl.where(counted, a, float("-inf")))
    m = tl.maximum(tl.max(m_lanes, 0), tl.load(previous_m_c + row))
    l_lanes = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        columns_at = start + offsets
        counted = (columns_at < columns) & (columns_at != positive) if DIAGONAL else columns_at < columns
        a = tl.load(row_start + columns_at, mask=columns_at < columns, other=0.0) * scale
        p = tl.exp(tl.where(counted, a - m, float("-inf")))
        l_lanes += p
        if SLOPES:
            tl.store(exp_cM + row * columns + columns_at, (p * half_gain).to(exp_cM.dtype.element_ty), mask=columns_at < columns)
    tl.store(m_c + row, m)
    tl.store(l_c + row, tl.sum(l_lanes, 0))
    if DIAGONAL:
        tl.store(positive_c + row, tl.load(row_start + positive) * scale)


@triton.jit
def _sigmoid_panel_kernel(
    cosine_cM,
    teacher_KcM,
    gains_1K,
    biases_1K,
    sums_4c,
    kd_cM,
    hard_cM,
    rows,
    teacher_rows,
    columns,
    diagonal,
    half_gain,
    DIAGONAL: tl.constexpr,
    TEACHERS: tl.constexpr,
    HARD: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_start = row * columns
    scale, bias = tl.load(gains_1K), tl.load(biases_1K)
    offsets = tl.arange(0, BLOCK)
    kd = tl.zeros((BLOCK,), tl.float32)
    kd_slopes = tl.zeros((BLOCK,), tl.float32)
    hard = tl.zeros((BLOCK,), tl.float32)
    hard_slopes = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        columns_at = start + offsets
        mask = columns_at < columns
        a = tl.load(cosine_cM + row_start + columns_at, mask=mask, other=0.0) * scale + bias
        exp_neg_abs_a = tl.exp(-tl.abs(a))
        softplus_neg_abs_a = _log1p(exp_neg_abs_a)
        sigmoid_neg_abs_a = exp_neg_abs_a / (1.0 + exp_neg_abs_a)
        if TEACHERS > 0:
            # With the sign that makes b negative, x = -a sign(b) and y = -|b|, nothing cancels: see `one_pass._kd`.
            divergence = tl.zeros((BLOCK,), tl.float32)
            slope = tl.zeros((BLOCK,), tl.float32)
            for teacher in tl.static_range(TEACHERS):
                b = tl.load(teacher_KcM + (row + teacher * teacher_rows) * columns + columns_at, mask=mask, other=0.0)
                b = b * tl.load(gains_1K + 1 + teacher) + tl.load(biases_1K + 1 + teacher)
                exp_neg_abs_b = tl.exp(-tl.abs(b))
                sigmoid_neg_abs_b = exp_neg_abs_b / (1.0 + exp_neg_abs_b)
                x = tl.where(b > 0, -a, a)
                divergence += tl.maximum(x, 0.0) + (softplus_neg_abs_a - _log1p(exp_neg_abs_b)) - sigmoid_neg_abs_b * (x + tl.abs(b))
                same = (a > 0) == (b > 0)
                slope += tl.where(same, sigmoid_neg_abs_a - sigmoid_neg_abs_b, sigmoid_neg_abs_a + sigmoid_neg_abs_b - 1.0)
            slope = tl.where(a > 0, -slope, slope) / TEACHERS
            kd += tl.where(mask, divergence, 0.0)
            if SLOPES:
                kd_slopes += tl.where(mask, slope, 0.0)
                tl.store(kd_cM + row_start + columns_at, (slope * half_gain).to(kd_cM.dtype.element_ty), mask=mask)
        if HARD:
            # softplus(-z a), z = 1 on the diagonal and -1 elsewhere
            za = -a
            if DIAGONAL:
                za = tl.where(columns_at == row + diagonal, a, -a)
            hard += tl.where(mask, tl.maximum(-za, 0.0) + softplus_neg_abs_a, 0.0)
            if SLOPES:
                hard_slope = tl.where(za > 0, sigmoid_neg_abs_a, 1.0 - sigmoid_neg_abs_a)
                if DIAGONAL:
                    hard_slope = tl.where(columns_at == row + diagonal, -hard_slope, hard_slope)
                hard_slopes += tl.where(mask, hard_slope, 0.0)
                tl.store(hard_cM + row_start + columns_at, (hard_slope * half_gain).to(hard_cM.dtype.element_ty), mask=mask)
    if TEACHERS > 0:
        tl.store(sums_4c + row, tl.sum(kd, 0) / TEACHERS)
        if SLOPES:
            tl.store(sums_4c + rows + row, tl.sum(kd_slopes, 0))
    if HARD:
        tl.store(sums_4c + 2 * rows + row, tl.sum(hard, 0))
        if SLOPES:
            tl.store(sums_4c + 3 * rows + row, tl.sum(hard_slopes, 0))


def _cosines(logits: Logits, rows: slice, out_cM: Tensor) -> None:
    """left @ right.T without the gain, in float32."""
    left_cD = logits.left_BD[rows]
    if logits.right_ND.dtype == out_cM.dtype:
        torch.mm(left_cD.to(out_cM.dtype), logits.right_ND.T, out=out_cM)
    else:
        torch.mm(left_cD, logits.right_ND.T, out_dtype=out_cM.dtype, out=out_cM)


class TritonOnePass(NamedTuple):
    """`OnePassKernels` on CUDA, or on any device under Triton's interpreter. chunk: rows of a panel."""

    chunk: int

    @classmethod
    def of(cls, rows: int, columns: int, chunk: int | None) -> TritonOnePass:
        return cls(chunk or max(1, min(rows, PANEL_BYTES // (columns * torch.float32.itemsize))))

    def exp_panels(self, logits: Logits, diagonal: int | None, m_B: Tensor, slopes: bool) -> Iterator[ExpPanel]:
        (panel,) = scratch_panels(1, self.chunk, logits)
        exp_panel = torch.empty_like(panel, dtype=logits.right_ND.dtype) if slopes else None
        for rows in chunks(len(logits.left_BD), self.chunk):
            cosine_cM = panel[: rows.stop - rows.start]
            _cosines(logits, rows, cosine_cM)
            m_c, l_c, positive_c = (torch.empty_like(m_B[rows]) for _ in range(3))
            with torch.cuda.device_of(cosine_cM):  # Triton launches on the current device, whichever holds the panel
                _exp_panel_kernel[(len(cosine_cM),)](
                    cosine_cM,
                    logits.gain,
                    m_B[rows],
                    m_c,
                    l_c,
                    positive_c,
                    panel if exp_panel is None else exp_panel,
                    cosine_cM.shape[1],
                    (diagonal or 0) + rows.start,
                    half_gain(logits.left_BD.dtype),
                    DIAGONAL=diagonal is not None,
                    SLOPES=slopes,
                    BLOCK=_block(cosine_cM),
                    num_warps=WARPS,
                )
            exp_cM = None if exp_panel is None else exp_panel[: len(cosine_cM)]
            yield ExpPanel(rows, None if diagonal is None else positive_c, m_c, l_c, exp_cM)

    def sigmoid_panels(
        self, student: BiasedLogits, teachers: Sequence[BiasedLogits], diagonal: int | None, hard: bool, slopes: bool
    ) -> Iterator[tuple[slice, tuple[SigmoidPanel, ...]]]:
        left_BD, right_MD, _ = student.logits
        (panel,) = scratch_panels(1, self.chunk, student.logits)
        teacher_cosines = panel.new_empty((len(teachers), *panel.shape))
        slope_panels = [torch.empty_like(panel, dtype=right_MD.dtype) if slopes else None for _ in range(bool(teachers) + hard)]
        models = (student, *teachers)
        gains, biases = torch.stack([model.logits.gain for model in models]), torch.stack([model.bias for model in models])
        for rows in chunks(len(left_BD), self.chunk):
            height = rows.stop - rows.start
            cosine_cM = panel[:height]
            for model, out_cM in zip(models, (cosine_cM, *teacher_cosines[:, :height]), strict=True):
                _cosines(model.logits, rows, out_cM)
            sums_4c = panel.new_empty((4, height))
            with torch.cuda.device_of(cosine_cM):
                _sigmoid_panel_kernel[(height,)](
                    cosine_cM,
                    teacher_cosines if teachers else panel,
                    gains,
                    biases,
                    sums_4c,
                    panel if slope_panels[0] is None else slope_panels[0],
                    panel if slope_panels[-1] is None else slope_panels[-1],
                    height,
                    len(panel),
                    cosine_cM.shape[1],
                    (diagonal or 0) + rows.start,
                    half_gain(left_BD.dtype),
                    DIAGONAL=diagonal is not None,
                    TEACHERS=len(teachers),
                    HARD=hard,
                    SLOPES=slopes,
                    BLOCK=_block(cosine_cM),
                    num_warps=WARPS,
                )
            kd_c, kd_slope_c, hard_c, hard_slope_c = sums_4c.unbind()
            sums = ([(kd_c, kd_slope_c)] if teachers else []) + ([(hard_c, hard_slope_c)] if hard else [])
            parts = [
                SigmoidPanel(loss_c, None, None) if slope_panel is None else SigmoidPanel(loss_c, slope_c, slope_panel[:height])
                for (loss_c, slope_c), slope_panel in zip(sums, slope_panels, strict=True)
            ]
            yield rows, tuple(parts)


def _block(panel_cM: Tensor) -> int:
    return min(COLUMNS, int(triton.next_power_of_2(panel_cM.shape[1])))
