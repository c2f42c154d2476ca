"""The slope of a similarity loss by its logits, one panel of rows: a Triton kernel that forms each logit and keeps its softmax differences.

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
from megakd_kernels.softmax_stats import Softmaxes
from megakd_kernels.triton.tiles import LOG2_E, Operands, Tiles, fitting, launch_options, place, product

_LOG2_E = tl.constexpr(LOG2_E)

# Registers and spilled bytes, stored and loaded, by ptxas 12.9 for sm_90 | sm_80, one teacher, widths that are multiples of 64:
#   tile, warps   soft               soft and hard
#   128x128, 8    244/0 | 255/360    255/1640 | 255/1560
#   128x64, 8     151/0 | 199/0      224/0    | 242/0
# A tile of 128x128 reads a third less than one of 128x64: it is taken where it fits the registers of a Hopper. NOT timed on a GPU.
SOFT_TILES = Tiles(128, 128, 64, 8, 3)
HARD_TILES = Tiles(128, 64, 64, 8, 3)


@triton.jit
def _softmaxes(logits, row_reference, row_weight, column_reference, column_weight, rows, columns, n_rows, n_columns, sharpen):
    """Of rows and columns, each times its line's weight, summed. The weights' sign is that of the first line."""
    row_m = tl.load(row_reference + rows, mask=rows < n_rows, other=1e30)  # a line that is not there has no softmax
    column_n = tl.load(column_reference + columns, mask=columns < n_columns, other=1e30)
    row_sign = tl.where(tl.load(row_weight) < 0, -1.0, 1.0)
    column_sign = tl.where(tl.load(column_weight) < 0, -1.0, 1.0)
    by_row = tl.exp2(logits * sharpen - row_m[:, None]) * row_sign
    return by_row + tl.exp2(logits * sharpen - column_n[None, :]) * column_sign


@triton.jit
def _slope_kernel(
    student_left, student_right, student_gain, teacher_left, teacher_right, teacher_gain,
    row_soft_reference, row_hard_reference, row_teach_reference, row_soft, row_hard, row_teach,
    column_soft_reference, column_hard_reference, column_teach_reference, column_soft, column_hard, column_teach,
    so_far, out, diagonal_weight,
    n_rows, n_columns, student_width, teacher_width,
    student_left_stride, student_right_stride, teacher_left_stride, teacher_right_stride, so_far_stride, out_stride, sharpen, diagonal,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, HARD: tl.constexpr, DIAGONAL: tl.constexpr,
    EVEN_LINES: tl.constexpr, EVEN_WIDTH: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of the slope. STUDENT: the student's softmaxes are part of it; otherwise it continues what is in `so_far`."""
    down, across = place(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_columns, BLOCK_N), GROUP_M)
    rows = down * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = across * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    if STUDENT:
        a = product(
            student_left, student_right, student_left_stride, student_right_stride, student_width, rows, columns, n_rows, n_columns,
            EVEN_WIDTH, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
        ) * (tl.load(student_gain).to(tl.float32) * _LOG2_E)  # fmt: skip
        slope = _softmaxes(a, row_soft_reference, row_soft, column_soft_reference, column_soft, rows, columns, n_rows, n_columns, 1.0)
        if HARD:
            slope += _softmaxes(
                a, row_hard_reference, row_hard, column_hard_reference, column_hard, rows, columns, n_rows, n_columns, sharpen
            )
    else:
        slope_at = so_far + rows.to(tl.int64)[:, None] * so_far_stride + columns[None, :]
        slope = tl.load(slope_at) if EVEN_LINES else tl.load(slope_at, mask=real, other=0.0)
    if TEACHER:
        b = product(
            teacher_left, teacher_right, teacher_left_stride, teacher_right_stride, teacher_width, rows, columns, n_rows, n_columns,
            EVEN_WIDTH, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
        ) * (tl.load(teacher_gain).to(tl.float32) * _LOG2_E)  # fmt: skip
        slope += _softmaxes(b, row_teach_reference, row_teach, column_teach_reference, column_teach, rows, columns, n_rows, n_columns, 1.0)
    if DIAGONAL:
        own = (rows + diagonal)[:, None] == columns[None, :]
        slope = tl.where(own, slope - tl.load(diagonal_weight).to(tl.float32), slope)
    out_at = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    if EVEN_LINES:
        tl.store(out_at, slope.to(out.dtype.element_ty))
    else:
        tl.store(out_at, slope.to(out.dtype.element_ty), mask=real)


def _reference(top_n: Tensor, weight_n: Tensor, sharpen: float) -> Tensor:
    """r such that 2^(sharpen * logit - r) = |weight| * 2^(sharpen * (logit - top)).

    One number a line instead of two, formed here: a thread of the kernel holds 32 columns, and registers are what limits its tile.
    """
    return top_n * (sharpen * LOG2_E) - weight_n.abs().log2()


def _side(name: str, softmaxes: Softmaxes, sharpen: float | None, teacher: int) -> dict[str, Tensor]:
    """What one side adds, as arguments; where a part is not there, the kernel does not look at what stands for it."""
    top_a, soft, hard, top_b, teach = softmaxes
    weights = {"soft": soft, "hard": soft, "teach": soft}
    references = dict.fromkeys(weights, _reference(top_a, soft, 1.0))
    if hard is not None and sharpen is not None:
        weights["hard"], references["hard"] = hard, _reference(top_a, hard, sharpen)
    if top_b is not None and teach is not None:
        weights["teach"], references["teach"] = teach[teacher], _reference(top_b[teacher], teach[teacher], 1.0)
    return {f"{name}_{kind}": weight for kind, weight in weights.items()} | {
        f"{name}_{kind}_reference": reference for kind, reference in references.items()
    }


def slope_panel(
    student: Logits,
    teachers: Sequence[Logits],
    rows: Softmaxes,
    columns: Softmaxes,
    *,
    sharpen: float | None,
    diagonal: int | None,
    diagonal_weight: Tensor,
    out_cM: Tensor,
    tiles: Tiles | None = None,
) -> None:
    """Writes to out_cM (c, M), float32 or half, of any row stride, the sum over both sides of

    soft * exp(a - top_a) + hard * exp(sharpen * (a - top_a)) + sum over k of teach_k * exp(b_k - top_b_k),

    less `diagonal_weight`, (), where column = row + diagonal. Without `sharpen` there is no hard part.
    student, teachers: the c rows by all M columns; float32, float16 or bfloat16. rows (c,), columns (M,): float32.
    The weights of one kind and side share their sign, as those that follow from one upstream gradient do.
    Two teachers or more add up in a float32 panel besides `out_cM`, which is rounded once. Nothing waits for the device.
    """
    own, others = Operands.of(student), [Operands.of(teacher) for teacher in teachers]
    hard = sharpen is not None and rows.hard is not None
    tiles = tiles or fitting(HARD_TILES if hard else SOFT_TILES, own, *others)
    launches: list[Operands | None] = [*others] or [None]
    so_far = out_cM if len(launches) == 1 or out_cM.dtype == torch.float32 else torch.empty_like(out_cM, dtype=torch.float32)
    grid = (triton.cdiv(len(own.left_BD), tiles.block_m) * triton.cdiv(len(own.right_MD), tiles.block_n),)
    with torch.cuda.device_of(own.left_BD):
        for place_K, teacher in enumerate(launches):
            first, last = place_K == 0, place_K + 1 == len(launches)
            out = out_cM if last else so_far
            arguments: dict[str, Any] = own.arguments("student") | (teacher or own).arguments("teacher")
            _slope_kernel[grid](
                **arguments, **_side("row", rows, sharpen, place_K), **_side("column", columns, sharpen, place_K),
                so_far=so_far, out=out, diagonal_weight=diagonal_weight,
                n_rows=len(own.left_BD), n_columns=len(own.right_MD), so_far_stride=so_far.stride(0), out_stride=out.stride(0),
                sharpen=1.0 if sharpen is None else float(sharpen), diagonal=diagonal or 0,
                STUDENT=first, TEACHER=teacher is not None, HARD=hard and first, DIAGONAL=last and diagonal is not None,
                **launch_options(own, teacher or own, tiles),
            )  # fmt: skip
