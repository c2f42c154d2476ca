"""`Elementwise` with one Triton kernel between the two products of a panel. Imported only where Triton is wanted.

Each program owns one row, so sums need no atomics and repeat bitwise. The scale and the bias are applied here: the products leave
cosines, and a pass over the panel of its own is saved. All arithmetic is in float32.

Legend: B local rows, M columns of a block, D width, c rows of a panel, K teachers.
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

from megakd_kernels.one_pass_torch import Biased, Part, Weighed, half_gain
from megakd_kernels.panels import Logits, chunks, spare_panels

# Columns that a program holds at a time, and its warps. NOT measured on a GPU yet.
COLUMNS, WARPS = 1024, 4

# One float32 panel; there is one a model, and the slopes' besides. NOT measured on a GPU yet: 2048 rows at N = 32768.
PANEL_BYTES = 256 << 20


@triton.jit
def _softplus_of_minus(fall):
    """log(1 + fall) for fall in [0, 1], exact to the last digits: 2 artanh(fall / (2 + fall)), whose argument is at most 1/3."""
    z = fall / (2.0 + fall)
    w = z * z
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13 + w / 15))))))
    return 2.0 * z * series


@triton.jit
def _weigh(
    cosine_cM,
    gain,
    before_c,
    top_c,
    sum_c,
    own_c,
    weights_cM,
    columns,
    diagonal,
    half,
    OWN: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = cosine_cM + row * columns
    scale = tl.load(gain)
    own = row + diagonal
    lanes = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + lanes
        seen = (at < columns) & (at != own) if OWN else at < columns
        a = tl.load(line + at, mask=at < columns, other=0.0) * scale
        highest = tl.maximum(highest, tl.where(seen, a, float("-inf")))
    top = tl.maximum(tl.max(highest, 0), tl.load(before_c + row))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + lanes
        seen = (at < columns) & (at != own) if OWN else at < columns
        a = tl.load(line + at, mask=at < columns, other=0.0) * scale
        weight = tl.exp(tl.where(seen, a - top, float("-inf")))
        total += weight
        if SLOPES:
            tl.store(weights_cM + row * columns + at, (weight * half).to(weights_cM.dtype.element_ty), mask=at < columns)
    tl.store(top_c + row, top)
    tl.store(sum_c + row, tl.sum(total, 0))
    if OWN:
        tl.store(own_c + row, tl.load(line + own) * scale)


@triton.jit
def _judge(
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
    half,
    OWN: tl.constexpr,
    TEACHERS: tl.constexpr,
    HARD: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = row * columns
    scale, bias = tl.load(gains_1K), tl.load(biases_1K)
    lanes = tl.arange(0, BLOCK)
    kd = tl.zeros((BLOCK,), tl.float32)
    kd_slopes = tl.zeros((BLOCK,), tl.float32)
    hard = tl.zeros((BLOCK,), tl.float32)
    hard_slopes = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + lanes
        there = at < columns
        a = tl.load(cosine_cM + line + at, mask=there, other=0.0) * scale + bias
        fall = tl.exp(-tl.abs(a))
        rest = _softplus_of_minus(fall)
        low = fall / (1.0 + fall)  # sigmoid(-|a|)
        if TEACHERS > 0:
            # Every b is looked at from below 0 (x = -a sign(b), y = -|b|), and so is the slope: see `one_pass_torch._teach`.
            divergence = tl.zeros((BLOCK,), tl.float32)
            slope = tl.zeros((BLOCK,), tl.float32)
            for teacher in tl.static_range(TEACHERS):
                b = tl.load(teacher_KcM + (row + teacher * teacher_rows) * columns + at, mask=there, other=0.0)
                b = b * tl.load(gains_1K + 1 + teacher) + tl.load(biases_1K + 1 + teacher)
                fall_b = tl.exp(-tl.abs(b))
                low_b = fall_b / (1.0 + fall_b)
                x = tl.where(b > 0, -a, a)
                divergence += tl.maximum(x, 0.0) + (rest - _softplus_of_minus(fall_b)) - low_b * (x + tl.abs(b))
                same = (a > 0) == (b > 0)
                slope += tl.where(same, low - low_b, low + low_b - 1.0)
            slope = tl.where(a > 0, -slope, slope) / TEACHERS
            kd += tl.where(there, divergence, 0.0)
            if SLOPES:
                kd_slopes += tl.where(there, slope, 0.0)
                tl.store(kd_cM + line + at, (slope * half).to(kd_cM.dtype.element_ty), mask=there)
        if HARD:
            # softplus(a) off the diagonal, softplus(-a) on it
            turned = -a
            if OWN:
                turned = tl.where(at == row + diagonal, a, -a)
            hard += tl.where(there, tl.maximum(-turned, 0.0) + rest, 0.0)
            if SLOPES:
                steep = tl.where(turned > 0, low, 1.0 - low)
                if OWN:
                    steep = tl.where(at == row + diagonal, -steep, steep)
                hard_slopes += tl.where(there, steep, 0.0)
                tl.store(hard_cM + line + at, (steep * half).to(hard_cM.dtype.element_ty), mask=there)
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


class Fused(NamedTuple):
    """`Elementwise` on CUDA, or on any device under Triton's interpreter. chunk: rows of a panel."""

    chunk: int

    @classmethod
    def of(cls, rows: int, columns: int, chunk: int | None) -> Fused:
        return cls(chunk or max(1, min(rows, PANEL_BYTES // (columns * torch.float32.itemsize))))

    def weigh(self, logits: Logits, diagonal: int | None, top_B: Tensor, slopes: bool) -> Iterator[Weighed]:
        (panel,) = spare_panels(1, self.chunk, logits)
        weights = torch.empty_like(panel, dtype=logits.right_ND.dtype) if slopes else None
        for rows in chunks(len(logits.left_BD), self.chunk):
            cosine_cM = panel[: rows.stop - rows.start]
            _cosines(logits, rows, cosine_cM)
            top_c, sum_c, own_c = (torch.empty_like(top_B[rows]) for _ in range(3))
            with torch.cuda.device_of(cosine_cM):  # Triton launches on the current device, whichever holds the panel
                _weigh[(len(cosine_cM),)](
                    cosine_cM,
                    logits.gain,
                    top_B[rows],
                    top_c,
                    sum_c,
                    own_c,
                    panel if weights is None else weights,
                    cosine_cM.shape[1],
                    (diagonal or 0) + rows.start,
                    half_gain(logits.left_BD.dtype),
                    OWN=diagonal is not None,
                    SLOPES=slopes,
                    BLOCK=_block(cosine_cM),
                    num_warps=WARPS,
                )
            yield Weighed(rows, None if diagonal is None else own_c, top_c, sum_c, None if weights is None else weights[: len(cosine_cM)])

    def judge(
        self, student: Biased, teachers: Sequence[Biased], diagonal: int | None, hard: bool, slopes: bool
    ) -> Iterator[tuple[slice, tuple[Part, ...]]]:
        left_BD, right_MD, _ = student.logits
        (panel,) = spare_panels(1, self.chunk, student.logits)
        guides = panel.new_empty((len(teachers), *panel.shape))
        made = [torch.empty_like(panel, dtype=right_MD.dtype) if slopes else None for _ in range(bool(teachers) + hard)]
        every = (student, *teachers)
        gains, biases = torch.stack([each.logits.gain for each in every]), torch.stack([each.bias for each in every])
        for rows in chunks(len(left_BD), self.chunk):
            height = rows.stop - rows.start
            cosine_cM = panel[:height]
            for each, out_cM in zip(every, (cosine_cM, *(guide[:height] for guide in guides)), strict=True):
                _cosines(each.logits, rows, out_cM)
            sums_4c = panel.new_empty((4, height))
            with torch.cuda.device_of(cosine_cM):
                _judge[(height,)](
                    cosine_cM,
                    guides if teachers else panel,
                    gains,
                    biases,
                    sums_4c,
                    panel if made[0] is None else made[0],
                    panel if made[-1] is None else made[-1],
                    height,
                    len(panel),
                    cosine_cM.shape[1],
                    (diagonal or 0) + rows.start,
                    half_gain(left_BD.dtype),
                    OWN=diagonal is not None,
                    TEACHERS=len(teachers),
                    HARD=hard,
                    SLOPES=slopes,
                    BLOCK=_block(cosine_cM),
                    num_warps=WARPS,
                )
            kd_c, kd_total_c, hard_c, hard_total_c = sums_4c.unbind()
            sums = ([(kd_c, kd_total_c)] if teachers else []) + ([(hard_c, hard_total_c)] if hard else [])
            parts = [
                Part(loss_c, None, None) if whole is None else Part(loss_c, total_c, whole[:height])
                for (loss_c, total_c), whole in zip(sums, made, strict=True)
            ]
            yield rows, tuple(parts)


def _block(panel_cM: Tensor) -> int:
    return min(COLUMNS, int(triton.next_power_of_2(panel_cM.shape[1])))
