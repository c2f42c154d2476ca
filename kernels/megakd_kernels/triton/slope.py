"""The slope (d loss / d logits) of a softmax loss, one panel of rows: a Triton kernel that stores differences of softmaxes.

Legend: c rows of the panel, M columns, D width, K teachers. a student logits, b teacher logits, times log2(e).
"""

# Triton has no types, and the parameters of its kernels are not Python values.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd_kernels.panels import Logits
from megakd_kernels.softmax_stats import SlopeWeights
from megakd_kernels.triton.tiles import LOG2_E, Operands, Tiles, launch_options, product, tile_position, tiles_for

_LOG2_E = tl.constexpr(LOG2_E)

# Registers and spilled bytes, stored and loaded, by ptxas 12.9 for sm_90 | sm_80, one teacher, widths that are multiples of 64:
#   tile, warps   KD                 KD and hard
#   128x128, 8    244/0 | 255/360    255/1640 | 255/1560
#   128x64, 8     151/0 | 199/0      224/0    | 242/0
# A tile of 128x128 reads a third less than one of 128x64: it is taken where it fits the registers of a Hopper. NOT timed on a GPU.
KD_TILES = Tiles(128, 128, 64, 8, 3)
HARD_TILES = Tiles(128, 64, 64, 8, 3)


@triton.jit
def _weighted_softmaxes(logits, row_lse, row_weight, column_lse, column_weight, rows, columns, n_rows, n_columns, temperature):
    """The softmaxes of rows and columns, each times its line's weight, summed. All weights have the sign of the first line's."""
    lse_m = tl.load(row_lse + rows, mask=rows < n_rows, other=1e30)  # beyond the last line: a softmax of 0
    lse_n = tl.load(column_lse + columns, mask=columns < n_columns, other=1e30)
    row_sign = tl.where(tl.load(row_weight) < 0, -1.0, 1.0)
    column_sign = tl.where(tl.load(column_weight) < 0, -1.0, 1.0)
    by_row = tl.exp2(logits * temperature - lse_m[:, None]) * row_sign
    return by_row + tl.exp2(logits * temperature - lse_n[None, :]) * column_sign


@triton.jit
def _slope_kernel(
    student_left, student_right, student_gain, teacher_left, teacher_right, teacher_gain,
    row_student_lse, row_hard_lse, row_teacher_lse, row_student_weight, row_hard_weight, row_teacher_weight,
    column_student_lse, column_hard_lse, column_teacher_lse, column_student_weight, column_hard_weight, column_teacher_weight,
    accumulated, out, diagonal_weight,
    n_rows, n_columns, student_width, teacher_width,
    student_left_stride, student_right_stride, teacher_left_stride, teacher_right_stride, accumulated_stride, out_stride,
    temperature, diagonal,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, HARD: tl.constexpr, DIAGONAL: tl.constexpr,
    EVEN_LINES: tl.constexpr, EVEN_WIDTH: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of the slope. STUDENT: with the student's softmaxes; otherwise it is added to `accumulated`."""
    down, across = tile_position(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_columns, BLOCK_N), GROUP_M)
    rows = down * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = across * BLOCK_N + tl.arange(0, BLOCK_N)
    in_bounds = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    if STUDENT:
        a = product(
            student_left, student_right, student_left_stride, student_right_stride, student_width, rows, columns, n_rows, n_columns,
            EVEN_WIDTH, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
        ) * (tl.load(student_gain).to(tl.float32) * _LOG2_E)  # fmt: skip
        slope = _weighted_softmaxes(
            a, row_student_lse, row_student_weight, column_student_lse, column_student_weight, rows, columns, n_rows, n_columns, 1.0
        )
        if HARD:
            slope += _weighted_softmaxes(
                a, row_hard_lse, row_hard_weight, column_hard_lse, column_hard_weight, rows, columns, n_rows, n_columns, temperature
            )
    else:
        slope_at = accumulated + rows.to(tl.int64)[:, None] * accumulated_stride + columns[None, :]
        slope = tl.load(slope_at) if EVEN_LINES else tl.load(slope_at, mask=in_bounds, other=0.0)
    if TEACHER:
        b = product(
            teacher_left, teacher_right, teacher_left_stride, teacher_right_stride, teacher_width, rows, columns, n_rows, n_columns,
            EVEN_WIDTH, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
        ) * (tl.load(teacher_gain).to(tl.float32) * _LOG2_E)  # fmt: skip
        slope += _weighted_softmaxes(
            b, row_teacher_lse, row_teacher_weight, column_teacher_lse, column_teacher_weight, rows, columns, n_rows, n_columns, 1.0
        )
    if DIAGONAL:
        is_positive = (rows + diagonal)[:, None] == columns[None, :]
        slope = tl.where(is_positive, slope - tl.load(diagonal_weight).to(tl.float32), slope)
    out_at = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    if EVEN_LINES:
        tl.store(out_at, slope.to(out.dtype.element_ty))
    else:
        tl.store(out_at, slope.to(out.dtype.element_ty), mask=in_bounds)


def _weighted_lse(m_n: Tensor, weight_n: Tensor, temperature: float) -> Tensor:
    """lse such that 2^(temperature * logit - lse) = |weight| * 2^(temperature * (logit - m)); with weight = 1 / l the logsumexp of base 2.

    One number a line instead of two: a thread of the kernel holds 32 columns, and registers limit its tile.
    """
    return m_n * (temperature * LOG2_E) - weight_n.abs().log2()


def _side_arguments(name: str, side: SlopeWeights, hard_temperature: float | None, teacher: int) -> dict[str, Tensor]:
    """The arguments of the rows or the columns. In place of a part that is not there stands the student's; the kernel does not read it."""
    weights = dict.fromkeys(("student", "hard", "teacher"), side.student)
    lses = dict.fromkeys(weights, _weighted_lse(side.m_a, side.student, 1.0))
    if side.hard is not None and hard_temperature is not None:
        weights["hard"], lses["hard"] = side.hard, _weighted_lse(side.m_a, side.hard, hard_temperature)
    if side.m_b is not None and side.teacher is not None:
        weights["teacher"], lses["teacher"] = side.teacher[teacher], _weighted_lse(side.m_b[teacher], side.teacher[teacher], 1.0)
    return {f"{name}_{part}_weight": weight for part, weight in weights.items()} | {f"{name}_{part}_lse": lse for part, lse in lses.items()}


def slope_panel(
    student: Logits,
    teachers: Sequence[Logits],
    rows: SlopeWeights,
    columns: SlopeWeights,
    *,
    hard_temperature: float | None,
    diagonal: int | None,
    diagonal_weight: Tensor,
    out_cM: Tensor,
    tiles: Tiles | None = None,
) -> None:
    """Writes to out_cM (c, M), float32 or half, of any row stride, the sum over both sides of

    student * exp(a - m_a) + hard * exp(hard_temperature * (a - m_a)) + sum over k of teacher_k * exp(b_k - m_b_k),

    less `diagonal_weight`, (), where column = row + diagonal. Without `hard_temperature` there is no hard part.
    student, teachers: the c rows by all M columns; float32, float16 or bfloat16. rows (c,), columns (M,): float32.
    The weights of one part and side have one sign, as those that follow from one upstream gradient have.
    Two teachers or more are summed in a float32 panel, which is rounded once to `out_cM`. Nothing waits for the device.
    """
    operands, others = Operands.of(student), [Operands.of(teacher) for teacher in teachers]
    hard = hard_temperature is not None and rows.hard is not None
    tiles = tiles or tiles_for(HARD_TILES if hard else KD_TILES, operands, *others)
    launches: list[Operands | None] = [*others] or [None]
    accumulated = out_cM if len(launches) == 1 or out_cM.dtype == torch.float32 else torch.empty_like(out_cM, dtype=torch.float32)
    grid = (triton.cdiv(len(operands.left_BD), tiles.block_m) * triton.cdiv(len(operands.right_MD), tiles.block_n),)
    with torch.cuda.device_of(operands.left_BD):
        for number, teacher in enumerate(launches):
            first, last = number == 0, number + 1 == len(launches)
            out = out_cM if last else accumulated
            arguments: dict[str, Any] = operands.arguments("student") | (teacher or operands).arguments("teacher")
            _slope_kernel[grid](
                **arguments,
                **_side_arguments("row", rows, hard_temperature, number),
                **_side_arguments("column", columns, hard_temperature, number),
                accumulated=accumulated, out=out, diagonal_weight=diagonal_weight,
                n_rows=len(operands.left_BD), n_columns=len(operands.right_MD),
                accumulated_stride=accumulated.stride(0), out_stride=out.stride(0),
                temperature=1.0 if hard_temperature is None else float(hard_temperature), diagonal=diagonal or 0,
                STUDENT=first, TEACHER=teacher is not None, HARD=hard and first, DIAGONAL=last and diagonal is not None,
                **launch_options(operands, teacher or operands, tiles),
            )  # fmt: skip
