"""One Triton pass over a stripe of the similarity matrix: the softmax statistics of its rows and columns, without the logits in memory.

A program owns a column tile and walks down some row tiles. The columns' statistics stay in its registers until the end, the rows'
are stored at each tile; both go to slices of scratch memory that no other program writes, and are merged in a fixed order afterwards.
No atomics: runs repeat bitwise.

Legend: B rows, M columns, D width, n lines of one side, K teachers, F fields. a student logits, b teacher logits, times log2(e).
m maximum (static mode: a constant), l sum of 2^(logit - m), cross_term as in `SoftmaxStats`, in base 2.
"""

# Triton has no types, and the parameters of its kernels are not Python values.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd_kernels.panels import Logits
from megakd_kernels.softmax_stats import SoftmaxStats
from megakd_kernels.triton.tiles import LN_2, LOG2_E, Operands, Tiles, launch_options, product, tile_position, tiles_for

# In static mode every exponential is 2^(a - c), c = max(bound - STATIC_HEADROOM, 0), bound = gain * log2(e): no maximum is needed. Largest:
# 2^90, times a span of 2^8 in the cross term, times 2^20 lines: 2^118 < 2^127. Smallest, with cosine -1: 2^(90 - 2 bound); the backward
# pass divides weights of up to 2^13 by it, so it must stay above 2^-115. gain <= 70: 90 - 2 * 70 * log2(e) = -112. Both ends leave room for
# embeddings whose norm exceeds 1 by the rounding of bfloat16 (2^-9 each: 0.4 in the exponent). c is not below 0: a - c would be rounded to
# the digits of a c of -70.
STATIC_HEADROOM = 90.0
STATIC_LIMIT = 70.0

# Registers and spilled bytes, stored and loaded, by ptxas 12.9 for sm_90 | sm_80, widths that are multiples of 64:
#   tile, warps   online, a teacher    and hard             static, a teacher    online, none       static, none
#   128x128, 8    255/3024 | 255/1108  255/4580 | 255/1228  255/1492 | 255/820   255/0 | 246/0      238/0 | 240/0
#   128x64, 8     253/0    | 249/0     255/56   | 255/0     252/0    | 236/0     170/0 | 184/0      136/0 | 176/0
#   128x64, 4     255/856  | 255/1304  255/1232 | 255/1716  255/488  | 255/904   245/0 | 250/0      254/0 | 250/0
# Two float32 accumulators and their statistics do not fit into the registers at 128x128. NOT timed on a GPU.
PAIR_TILES = Tiles(128, 64, 64, 8, 3)
SINGLE_TILES = Tiles(128, 128, 64, 8, 3)

# Scratch for the rows' parts of one launch; columns go slab by slab. At B = N = 131072 all parts at once would be 2.7 GB.
SLAB_BYTES = 128 << 20
# Sixteen waves of programs on the 132 multiprocessors of an H100 or H200, where a slab has as many tiles: the last is partly empty.
PROGRAMS = 16 * 132

_LOG2_E = tl.constexpr(LOG2_E)
_STATIC_HEADROOM = tl.constexpr(STATIC_HEADROOM)
# The maximum over no logit: finite, as the difference of two infinities is not a number.
_NO_LOGIT = tl.constexpr(-1e30)


@triton.jit
def _store_fields(
    at, stride, valid, l_a, m_a, l_hard, l_b, m_b, cross_term, TEACHER: tl.constexpr, HARD: tl.constexpr, STATIC: tl.constexpr
):
    """The statistics of some lines, in the order of `_Fields`."""
    first: tl.constexpr = 3 if TEACHER else 1
    tl.store(at, l_a, mask=valid)
    if TEACHER:
        tl.store(at + stride, l_b, mask=valid)
        tl.store(at + 2 * stride, cross_term, mask=valid)
    if not STATIC:
        tl.store(at + first * stride, m_a, mask=valid)
        if TEACHER:
            tl.store(at + (first + 1) * stride, m_b, mask=valid)
    if HARD:
        tl.store(at + (first + 1 + TEACHER) * stride, l_hard, mask=valid)


@triton.jit
def _load_fields(at, stride, valid, TEACHER: tl.constexpr, HARD: tl.constexpr, STATIC: tl.constexpr):
    """The fields as `_store_fields` wrote them. A line that is not valid adds nothing; a field that was not stored repeats the first."""
    first: tl.constexpr = 3 if TEACHER else 1
    l_a = tl.load(at, mask=valid, other=0.0)
    m_a, l_hard, l_b, m_b, cross_term = l_a, l_a, l_a, l_a, l_a
    if TEACHER:
        l_b = tl.load(at + stride, mask=valid, other=0.0)
        cross_term = tl.load(at + 2 * stride, mask=valid, other=0.0)
    if not STATIC:
        m_a = tl.load(at + first * stride, mask=valid, other=_NO_LOGIT)
        if TEACHER:
            m_b = tl.load(at + (first + 1) * stride, mask=valid, other=_NO_LOGIT)
    if HARD:
        l_hard = tl.load(at + (first + 1 + TEACHER) * stride, mask=valid, other=0.0)
    return l_a, m_a, l_hard, l_b, m_b, cross_term


@triton.jit
def _initial_fields(LINES: tl.constexpr):
    """The fields of lines over no logit."""
    zero = tl.zeros((LINES,), tl.float32)
    no_logit = tl.full((LINES,), _NO_LOGIT, tl.float32)
    return zero, no_logit, zero, zero, no_logit, zero


@triton.jit
def _rescaled(l_a, l_hard, l_b, cross_term, delta_a, delta_b, temperature, TEACHER: tl.constexpr, HARD: tl.constexpr):
    """The sums after their maxima rose; delta: the old maximum minus the new one."""
    l_a *= tl.exp2(delta_a)
    if HARD:
        l_hard *= tl.exp2(delta_a * temperature)
    if TEACHER:
        alpha_b = tl.exp2(delta_b)
        cross_term = (cross_term + l_b * (delta_b - delta_a)) * alpha_b
        l_b *= alpha_b
    return l_a, l_hard, l_b, cross_term


@triton.jit
def _tile_sums(a, b, m_a, m_b, temperature, AXIS: tl.constexpr, TEACHER: tl.constexpr, HARD: tl.constexpr):
    """The sums of one tile along one axis, relative to these maxima."""
    shifted_a = a - tl.expand_dims(m_a, AXIS)
    l_a = tl.sum(tl.exp2(shifted_a), AXIS)
    l_hard, l_b, cross_term = l_a, l_a, l_a
    if TEACHER:
        shifted_b = b - tl.expand_dims(m_b, AXIS)
        exp_b = tl.exp2(shifted_b)
        l_b = tl.sum(exp_b, AXIS)
        cross_term = tl.sum(exp_b * (shifted_b - shifted_a), AXIS)
    if HARD:
        l_hard = tl.sum(tl.exp2(shifted_a * temperature), AXIS)
    return l_a, l_hard, l_b, cross_term


@triton.jit
def _statistics_kernel(
    student_left, student_right, student_gain, teacher_left, teacher_right, teacher_gain, rows_out, columns_out, diagonal_out,
    n_rows, n_columns, student_width, teacher_width,
    student_left_stride, student_right_stride, teacher_left_stride, teacher_right_stride,
    first_tile, slab_tiles, macros, tiles_per_macro, row_fields_stride, column_fields_stride, column_parts_stride, temperature, diagonal,
    TEACHER: tl.constexpr, HARD: tl.constexpr, DIAGONAL: tl.constexpr, STATIC: tl.constexpr,
    EVEN_LINES: tl.constexpr, EVEN_WIDTH: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Column tile `first_tile + across` by the row tiles of one macro.

    rows_out: (F, slab_tiles, B). columns_out: (F, macros, columns of the slab). diagonal_out: (B,).
    """
    macro, across = tile_position(tl.program_id(0), macros, slab_tiles, GROUP_M)
    columns = (first_tile + across) * BLOCK_N + tl.arange(0, BLOCK_N)
    gain_a = tl.load(student_gain).to(tl.float32) * _LOG2_E
    gain_b = tl.load(teacher_gain).to(tl.float32) * _LOG2_E
    l_a, m_a, l_hard, l_b, m_b, cross_term = _initial_fields(BLOCK_N)
    last = tl.minimum((macro + 1) * tiles_per_macro, tl.cdiv(n_rows, BLOCK_M))
    for tile in range(macro * tiles_per_macro, last):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        a = product(
            student_left, student_right, student_left_stride, student_right_stride, student_width, rows, columns, n_rows, n_columns,
            EVEN_WIDTH, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
        ) * gain_a  # fmt: skip
        b = a
        if TEACHER:
            b = product(
                teacher_left, teacher_right, teacher_left_stride, teacher_right_stride, teacher_width, rows, columns, n_rows, n_columns,
                EVEN_WIDTH, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
            ) * gain_b  # fmt: skip
        if DIAGONAL:
            first_positive = tile * BLOCK_M + diagonal
            if (first_positive < (first_tile + across + 1) * BLOCK_N) & (first_positive + BLOCK_M > (first_tile + across) * BLOCK_N):
                is_positive = (rows + diagonal)[:, None] == columns[None, :]
                diagonal_logits = tl.sum(tl.where(is_positive, a, 0.0), 1)
                positives = rows + diagonal
                in_tile = (positives >= (first_tile + across) * BLOCK_N) & (positives < (first_tile + across + 1) * BLOCK_N)
                tl.store(diagonal_out + rows, diagonal_logits, mask=in_tile & (rows < n_rows))
        if not EVEN_LINES:
            in_bounds = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
            a = tl.where(in_bounds, a, _NO_LOGIT)
            b = tl.where(in_bounds, b, _NO_LOGIT)
        rows_at = rows_out + across.to(tl.int64) * n_rows + rows
        if STATIC:
            shifted_a = a - tl.maximum(gain_a - _STATIC_HEADROOM, 0.0)
            exp_a = tl.exp2(shifted_a)
            row_l_a = tl.sum(exp_a, 1)
            l_a += tl.sum(exp_a, 0)
            row_l_b, row_cross_term = row_l_a, row_l_a
            if TEACHER:
                shifted_b = b - tl.maximum(gain_b - _STATIC_HEADROOM, 0.0)
                exp_b = tl.exp2(shifted_b)
                row_l_b = tl.sum(exp_b, 1)
                l_b += tl.sum(exp_b, 0)
                cross_terms = exp_b * (shifted_b - shifted_a)
                row_cross_term = tl.sum(cross_terms, 1)
                cross_term += tl.sum(cross_terms, 0)
            _store_fields(
                rows_at, row_fields_stride, rows < n_rows, row_l_a, row_l_a, row_l_a, row_l_b, row_l_b, row_cross_term,
                TEACHER, HARD, STATIC,
            )  # fmt: skip
        else:
            row_m_a, new_m_a = tl.max(a, 1), tl.maximum(m_a, tl.max(a, 0))
            row_m_b, new_m_b = row_m_a, new_m_a
            if TEACHER:
                row_m_b, new_m_b = tl.max(b, 1), tl.maximum(m_b, tl.max(b, 0))
            row_l_a, row_l_hard, row_l_b, row_cross_term = _tile_sums(a, b, row_m_a, row_m_b, temperature, 1, TEACHER, HARD)
            _store_fields(
                rows_at, row_fields_stride, rows < n_rows, row_l_a, row_m_a, row_l_hard, row_l_b, row_m_b, row_cross_term,
                TEACHER, HARD, STATIC,
            )  # fmt: skip
            tile_l_a, tile_l_hard, tile_l_b, tile_cross_term = _tile_sums(a, b, new_m_a, new_m_b, temperature, 0, TEACHER, HARD)
            l_a, l_hard, l_b, cross_term = _rescaled(
                l_a, l_hard, l_b, cross_term, m_a - new_m_a, m_b - new_m_b, temperature, TEACHER, HARD
            )  # fmt: skip
            l_a, l_hard, l_b, cross_term = l_a + tile_l_a, l_hard + tile_l_hard, l_b + tile_l_b, cross_term + tile_cross_term
            m_a, m_b = new_m_a, new_m_b
    columns_at = columns_out + macro.to(tl.int64) * column_parts_stride + across * BLOCK_N + tl.arange(0, BLOCK_N)
    _store_fields(columns_at, column_fields_stride, columns < n_columns, l_a, m_a, l_hard, l_b, m_b, cross_term, TEACHER, HARD, STATIC)


@triton.jit
def _merge_kernel(
    parts_in, out, n_parts, n_lines, parts_fields_stride, parts_stride, out_fields_stride, temperature,
    TEACHER: tl.constexpr, HARD: tl.constexpr, STATIC: tl.constexpr, CONTINUES: tl.constexpr, PARTS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """The statistics of `LINES` lines over all their parts, (F, n_parts, ...), and over those in `out` if it continues."""
    lines = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    valid = lines < n_lines
    l_a, m_a, l_hard, l_b, m_b, cross_term = _initial_fields(LINES)
    if CONTINUES:
        l_a, m_a, l_hard, l_b, m_b, cross_term = _load_fields(out + lines, out_fields_stride, valid, TEACHER, HARD, STATIC)
    for first in range(0, n_parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        at = parts_in + part.to(tl.int64) * parts_stride + lines[None, :]
        part_l_a, part_m_a, part_l_hard, part_l_b, part_m_b, part_cross_term = _load_fields(
            at, parts_fields_stride, (part < n_parts) & valid[None, :], TEACHER, HARD, STATIC
        )
        if not STATIC:
            new_m_a = tl.maximum(m_a, tl.max(part_m_a, 0))
            new_m_b = tl.maximum(m_b, tl.max(part_m_b, 0)) if TEACHER else new_m_a
            l_a, l_hard, l_b, cross_term = _rescaled(
                l_a, l_hard, l_b, cross_term, m_a - new_m_a, m_b - new_m_b, temperature, TEACHER, HARD
            )  # fmt: skip
            part_l_a, part_l_hard, part_l_b, part_cross_term = _rescaled(
                part_l_a, part_l_hard, part_l_b, part_cross_term,
                part_m_a - new_m_a[None, :], part_m_b - new_m_b[None, :], temperature, TEACHER, HARD,
            )  # fmt: skip
            m_a, m_b = new_m_a, new_m_b
        l_a += tl.sum(part_l_a, 0)
        if HARD:
            l_hard += tl.sum(part_l_hard, 0)
        if TEACHER:
            l_b += tl.sum(part_l_b, 0)
            cross_term += tl.sum(part_cross_term, 0)
    _store_fields(out + lines, out_fields_stride, valid, l_a, m_a, l_hard, l_b, m_b, cross_term, TEACHER, HARD, STATIC)


class _Fields(NamedTuple):
    """Which statistics of a line a launch yields, in this order: l_a, (l_b, cross_term), (m_a, (m_b)), (l_hard)."""

    teacher: bool
    hard: bool
    static: bool

    @property
    def number(self) -> int:
        return (3 if self.teacher else 1) + (0 if self.static else 1 + self.teacher) + self.hard

    def switches(self) -> dict[str, bool]:
        return {"TEACHER": self.teacher, "HARD": self.hard, "STATIC": self.static}

    def stats(self, fields_Fn: Tensor, references: tuple[Tensor, Tensor]) -> SoftmaxStats:
        """In base e. references: the constants in place of m_a and m_b in static mode, ()."""
        fields = iter(fields_Fn.unbind(0))
        l_a = next(fields)
        l_b, cross_term = (next(fields), next(fields) * LN_2) if self.teacher else (None, None)
        maxima = [(reference.expand_as(l_a) if self.static else next(fields)) * LN_2 for reference in references[: 1 + self.teacher]]
        l_hard = next(fields) if self.hard else None
        of_teacher = [None if field is None else field[None] for field in (maxima[1] if self.teacher else None, l_b, cross_term)]
        return SoftmaxStats(maxima[0], l_a, l_hard, *of_teacher)


def _merge_parts(parts_FPn: Tensor, out_Fn: Tensor, temperature: float, fields: _Fields, *, continues: bool) -> None:
    lines, block = out_Fn.shape[1], 64
    _merge_kernel[(triton.cdiv(lines, block),)](
        parts_FPn, out_Fn, parts_FPn.shape[1], lines, parts_FPn.stride(0), parts_FPn.stride(1), out_Fn.stride(0), temperature,
        **fields.switches(), CONTINUES=continues, PARTS=16, LINES=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _launch(
    student: Operands, teacher: Operands | None, hard_temperature: float | None, diagonal: int | None, static: bool, tiles: Tiles | None
) -> tuple[SoftmaxStats, SoftmaxStats, Tensor | None]:
    """`stripe_statistics` with at most one teacher."""
    fields = _Fields(teacher is not None, hard_temperature is not None, static)
    tiles = tiles or tiles_for(PAIR_TILES if fields.teacher or fields.hard else SINGLE_TILES, student, teacher or student)
    rows, columns = len(student.left_BD), len(student.right_MD)
    row_tiles, column_tiles = triton.cdiv(rows, tiles.block_m), triton.cdiv(columns, tiles.block_n)
    slab = min(column_tiles, max(1, SLAB_BYTES // (4 * fields.number * rows)))
    tiles_per_macro = max(1, row_tiles * slab // PROGRAMS)
    macros = triton.cdiv(row_tiles, tiles_per_macro)
    new = student.left_BD.new_empty
    row_parts = new((fields.number, slab, rows), dtype=torch.float32)
    column_parts = new((fields.number, macros, slab * tiles.block_n), dtype=torch.float32)
    of_rows, of_columns = (new((fields.number, lines), dtype=torch.float32) for lines in (rows, columns))
    diagonal_B = None if diagonal is None else new((rows,), dtype=torch.float32)
    arguments: dict[str, Any] = student.arguments("student") | (teacher or student).arguments("teacher")
    for first in range(0, column_tiles, slab):
        wide = min(slab, column_tiles - first)
        _statistics_kernel[(wide * macros,)](
            **arguments,
            rows_out=row_parts, columns_out=column_parts, diagonal_out=row_parts if diagonal_B is None else diagonal_B,
            n_rows=rows, n_columns=columns, first_tile=first, slab_tiles=wide, macros=macros, tiles_per_macro=tiles_per_macro,
            row_fields_stride=row_parts.stride(0), column_fields_stride=column_parts.stride(0), column_parts_stride=column_parts.stride(1),
            temperature=1.0 if hard_temperature is None else float(hard_temperature), diagonal=diagonal or 0, DIAGONAL=diagonal is not None,
            **fields.switches(), **launch_options(student, teacher or student, tiles),
            # A multiply-add fused in one place and not in another would break "teacher equal to student: exactly 0".
            enable_fp_fusion=False,
        )  # fmt: skip
        start = first * tiles.block_n
        stop = min(start + wide * tiles.block_n, columns)
        _merge_parts(row_parts[:, :wide], of_rows, hard_temperature or 1.0, fields, continues=first > 0)
        _merge_parts(column_parts[:, :, : stop - start], of_columns[:, start:stop], hard_temperature or 1.0, fields, continues=False)
    units = ((side.gain.float() * LOG2_E - STATIC_HEADROOM).clamp_min(0) for side in (student, teacher or student))
    references = (next(units), next(units))
    return (
        fields.stats(of_rows, references),
        fields.stats(of_columns, references),
        None if diagonal_B is None else diagonal_B * LN_2,
    )


def stripe_statistics(
    student: Logits,
    teachers: Sequence[Logits],
    hard_temperature: float | None,
    *,
    diagonal: int | None,
    static: bool,
    tiles: Tiles | None = None,
) -> tuple[SoftmaxStats, SoftmaxStats, Tensor | None]:
    """Statistics of the rows (B,) and of the columns (M,) of a stripe of logits, and the student's logits on its diagonal, (B,).

    hard_temperature: the temperature, where the sum at temperature 1 (l_hard) is wanted as well; otherwise None.
    diagonal: column `row + diagonal` is a row's positive, for all B rows; None: no diagonal is returned.
    static: no running maximum; m is a constant. Only where no |logit| exceeds `STATIC_LIMIT`, without `hard_temperature`.
    tiles: None for the defaults measured at compile time (`tests/kernels/test_triton_compile.py`).
    Matrices float32, float16 or bfloat16; everything is summed in float32. A teacher equal to the student diverges by exactly 0.
    Scratch: `SLAB_BYTES` for the rows' parts, less for the columns'. Nothing waits for the device.
    """
    assert not (static and hard_temperature is not None), "the sum at temperature 1 spans a wider range than one offset can serve"
    assert diagonal is None or 0 <= diagonal <= len(student.right_ND) - len(student.left_BD)
    operands = Operands.of(student)
    with torch.cuda.device_of(operands.left_BD):
        launches = [
            _launch(operands, Operands.of(teacher), None if number else hard_temperature, None if number else diagonal, static, tiles)
            for number, teacher in enumerate(teachers)
        ] or [_launch(operands, None, hard_temperature, diagonal, static, tiles)]
    return _join_teachers([rows for rows, _, _ in launches]), _join_teachers([columns for _, columns, _ in launches]), launches[0][2]


def _join_teachers(stats: Sequence[SoftmaxStats]) -> SoftmaxStats:
    """From one launch for each teacher; each launch formed the same student logits."""
    if len(stats) == 1:
        return stats[0]
    return stats[0]._replace(**{field: torch.cat([getattr(each, field) for each in stats]) for field in ("m_b", "l_b", "cross_term")})
