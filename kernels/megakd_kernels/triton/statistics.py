"""One Triton pass over a stripe of the similarity matrix: the softmax statistics of its rows and columns, without the logits in memory.

A program owns a column tile and walks down some row tiles. The columns' statistics stay in its registers until the end, the rows'
leave at each tile; both go to slices of scratch memory that no other program writes, and are folded in a fixed order afterwards.
No atomics: runs repeat bitwise.

Legend: B rows, M columns, D width, n lines of one side, K teachers, F fields. a student logits, b teacher logits, times log2(e).
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
from megakd_kernels.softmax_stats import Normalisers
from megakd_kernels.triton.tiles import LN_2, LOG2_E, Operands, Tiles, fitting, launch_options, place, product

# In static mode every exponential is 2^(a - c), c = max(bound - STATIC_ROOM, 0), bound = gain * log2(e): no maximum is needed.
# Largest: 2^90, times a span of 2^8 in `gap`, times 2^20 lines: 2^118 < 2^127. Smallest, with cosine -1: 2^(90 - 2 bound); the backward
# pass divides weights of up to 2^13 by it, so it must stay above 2^-115. gain <= 70: 90 - 2 * 70 * log2(e) = -112. Both ends leave room
# for embeddings whose norm exceeds 1 by the rounding of bfloat16 (2^-9 each: 0.4 in the exponent). c is 0 wherever it can be: the
# difference a - c would be rounded to the digits of a c of -70.
STATIC_ROOM = 90.0
STATIC_LIMIT = 70.0

# Registers and spilled bytes, stored and loaded, by ptxas 12.9 for sm_90 | sm_80, widths that are multiples of 64:
#   tile, warps   online, a teacher    and hard             static, a teacher    online, none       static, none
#   128x128, 8    255/3024 | 255/1108  255/4580 | 255/1228  255/1492 | 255/820   255/0 | 246/0      238/0 | 240/0
#   128x64, 8     253/0    | 249/0     255/56   | 255/0     252/0    | 236/0     170/0 | 184/0      136/0 | 176/0
#   128x64, 4     255/856  | 255/1304  255/1232 | 255/1716  255/488  | 255/904   245/0 | 250/0      254/0 | 250/0
# Two float32 tiles and their statistics are too much for 128x128. NOT timed on a GPU.
PAIR_TILES = Tiles(128, 64, 64, 8, 3)
SINGLE_TILES = Tiles(128, 128, 64, 8, 3)

# Scratch for the rows' parts of one launch; columns go slab by slab. At B = N = 131072 all parts at once would be 2.7 GB.
SLAB_BYTES = 128 << 20
# Sixteen waves of programs on the 132 multiprocessors of an H100 or H200, where a slab has as many tiles: the last is part empty.
PROGRAMS = 16 * 132

_LOG2_E = tl.constexpr(LOG2_E)
_STATIC_ROOM = tl.constexpr(STATIC_ROOM)
# Stands for "no logit": finite, as the difference of two infinities is not a number.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _put(at, stride, valid, sum_a, top_a, hard, sum_b, top_b, gap, TEACHER: tl.constexpr, HARD: tl.constexpr, STATIC: tl.constexpr):
    """The fields of some lines, in the order of `_Fields`."""
    first: tl.constexpr = 3 if TEACHER else 1
    tl.store(at, sum_a, mask=valid)
    if TEACHER:
        tl.store(at + stride, sum_b, mask=valid)
        tl.store(at + 2 * stride, gap, mask=valid)
    if not STATIC:
        tl.store(at + first * stride, top_a, mask=valid)
        if TEACHER:
            tl.store(at + (first + 1) * stride, top_b, mask=valid)
    if HARD:
        tl.store(at + (first + 1 + TEACHER) * stride, hard, mask=valid)


@triton.jit
def _get(at, stride, valid, TEACHER: tl.constexpr, HARD: tl.constexpr, STATIC: tl.constexpr):
    """What `_put` wrote, in its order; a missing line adds nothing; a field that is not there repeats the first."""
    first: tl.constexpr = 3 if TEACHER else 1
    sum_a = tl.load(at, mask=valid, other=0.0)
    top_a, hard, sum_b, top_b, gap = sum_a, sum_a, sum_a, sum_a, sum_a
    if TEACHER:
        sum_b = tl.load(at + stride, mask=valid, other=0.0)
        gap = tl.load(at + 2 * stride, mask=valid, other=0.0)
    if not STATIC:
        top_a = tl.load(at + first * stride, mask=valid, other=_LOWEST)
        if TEACHER:
            top_b = tl.load(at + (first + 1) * stride, mask=valid, other=_LOWEST)
    if HARD:
        hard = tl.load(at + (first + 1 + TEACHER) * stride, mask=valid, other=0.0)
    return sum_a, top_a, hard, sum_b, top_b, gap


@triton.jit
def _empty(LINES: tl.constexpr):
    """The fields of lines without a logit."""
    zero = tl.zeros((LINES,), tl.float32)
    lowest = tl.full((LINES,), _LOWEST, tl.float32)
    return zero, lowest, zero, zero, lowest, zero


@triton.jit
def _recentred(sum_a, hard, sum_b, gap, fall_a, fall_b, sharpen, TEACHER: tl.constexpr, HARD: tl.constexpr):
    """Sums whose references rise by -fall."""
    sum_a *= tl.exp2(fall_a)
    if HARD:
        hard *= tl.exp2(fall_a * sharpen)
    if TEACHER:
        fade = tl.exp2(fall_b)
        gap = (gap + sum_b * (fall_b - fall_a)) * fade
        sum_b *= fade
    return sum_a, hard, sum_b, gap


@triton.jit
def _sums(a, b, top_a, top_b, sharpen, AXIS: tl.constexpr, TEACHER: tl.constexpr, HARD: tl.constexpr):
    """The sums of one tile along one axis, relative to these references."""
    below_a = a - tl.expand_dims(top_a, AXIS)
    sum_a = tl.sum(tl.exp2(below_a), AXIS)
    hard, sum_b, gap = sum_a, sum_a, sum_a
    if TEACHER:
        below_b = b - tl.expand_dims(top_b, AXIS)
        weight = tl.exp2(below_b)
        sum_b = tl.sum(weight, AXIS)
        gap = tl.sum(weight * (below_b - below_a), AXIS)
    if HARD:
        hard = tl.sum(tl.exp2(below_a * sharpen), AXIS)
    return sum_a, hard, sum_b, gap


@triton.jit
def _statistics_kernel(
    student_left, student_right, student_gain, teacher_left, teacher_right, teacher_gain, rows_out, columns_out, diagonal_out,
    n_rows, n_columns, student_width, teacher_width,
    student_left_stride, student_right_stride, teacher_left_stride, teacher_right_stride,
    first_tile, slab_tiles, macros, tiles_per_macro, row_fields_stride, column_fields_stride, column_parts_stride, sharpen, diagonal,
    TEACHER: tl.constexpr, HARD: tl.constexpr, DIAGONAL: tl.constexpr, STATIC: tl.constexpr,
    EVEN_LINES: tl.constexpr, EVEN_WIDTH: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Column tile `first_tile + across` by the row tiles of one macro.

    rows_out: (F, slab_tiles, B). columns_out: (F, macros, columns of the slab). diagonal_out: (B,).
    """
    macro, across = place(tl.program_id(0), macros, slab_tiles, GROUP_M)
    columns = (first_tile + across) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit_a = tl.load(student_gain).to(tl.float32) * _LOG2_E
    unit_b = tl.load(teacher_gain).to(tl.float32) * _LOG2_E
    sum_a, top_a, hard, sum_b, top_b, gap = _empty(BLOCK_N)
    last = tl.minimum((macro + 1) * tiles_per_macro, tl.cdiv(n_rows, BLOCK_M))
    for tile in range(macro * tiles_per_macro, last):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        a = product(
            student_left, student_right, student_left_stride, student_right_stride, student_width, rows, columns, n_rows, n_columns,
            EVEN_WIDTH, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
        ) * unit_a  # fmt: skip
        b = a
        if TEACHER:
            b = product(
                teacher_left, teacher_right, teacher_left_stride, teacher_right_stride, teacher_width, rows, columns, n_rows, n_columns,
                EVEN_WIDTH, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
            ) * unit_b  # fmt: skip
        if DIAGONAL:
            own = tile * BLOCK_M + diagonal
            if (own < (first_tile + across + 1) * BLOCK_N) & (own + BLOCK_M > (first_tile + across) * BLOCK_N):
                here = (rows + diagonal)[:, None] == columns[None, :]
                found = tl.sum(tl.where(here, a, 0.0), 1)
                own_columns = rows + diagonal
                in_tile = (own_columns >= (first_tile + across) * BLOCK_N) & (own_columns < (first_tile + across + 1) * BLOCK_N)
                tl.store(diagonal_out + rows, found, mask=in_tile & (rows < n_rows))
        if not EVEN_LINES:
            real = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
            a = tl.where(real, a, _LOWEST)
            b = tl.where(real, b, _LOWEST)
        rows_at = rows_out + across.to(tl.int64) * n_rows + rows
        if STATIC:
            below_a = a - tl.maximum(unit_a - _STATIC_ROOM, 0.0)
            weight_a = tl.exp2(below_a)
            row_sum_a = tl.sum(weight_a, 1)
            sum_a += tl.sum(weight_a, 0)
            row_sum_b, row_gap = row_sum_a, row_sum_a
            if TEACHER:
                below_b = b - tl.maximum(unit_b - _STATIC_ROOM, 0.0)
                weight_b = tl.exp2(below_b)
                row_sum_b = tl.sum(weight_b, 1)
                sum_b += tl.sum(weight_b, 0)
                lead = weight_b * (below_b - below_a)
                row_gap = tl.sum(lead, 1)
                gap += tl.sum(lead, 0)
            _put(rows_at, row_fields_stride, rows < n_rows, row_sum_a, row_sum_a, row_sum_a, row_sum_b, row_sum_b, row_gap,
                 TEACHER, HARD, STATIC)  # fmt: skip
        else:
            row_top_a, new_top_a = tl.max(a, 1), tl.maximum(top_a, tl.max(a, 0))
            row_top_b, new_top_b = row_top_a, new_top_a
            if TEACHER:
                row_top_b, new_top_b = tl.max(b, 1), tl.maximum(top_b, tl.max(b, 0))
            row_sum_a, row_hard, row_sum_b, row_gap = _sums(a, b, row_top_a, row_top_b, sharpen, 1, TEACHER, HARD)
            _put(rows_at, row_fields_stride, rows < n_rows, row_sum_a, row_top_a, row_hard, row_sum_b, row_top_b, row_gap,
                 TEACHER, HARD, STATIC)  # fmt: skip
            more_a, more_hard, more_b, more_gap = _sums(a, b, new_top_a, new_top_b, sharpen, 0, TEACHER, HARD)
            sum_a, hard, sum_b, gap = _recentred(
                sum_a, hard, sum_b, gap, top_a - new_top_a, top_b - new_top_b, sharpen, TEACHER, HARD
            )  # fmt: skip
            sum_a, hard, sum_b, gap = sum_a + more_a, hard + more_hard, sum_b + more_b, gap + more_gap
            top_a, top_b = new_top_a, new_top_b
    columns_at = columns_out + macro.to(tl.int64) * column_parts_stride + across * BLOCK_N + tl.arange(0, BLOCK_N)
    _put(columns_at, column_fields_stride, columns < n_columns, sum_a, top_a, hard, sum_b, top_b, gap, TEACHER, HARD, STATIC)


@triton.jit
def _fold_kernel(
    parts_in, out, n_parts, n_lines, parts_fields_stride, parts_stride, out_fields_stride, sharpen,
    TEACHER: tl.constexpr, HARD: tl.constexpr, STATIC: tl.constexpr, CONTINUES: tl.constexpr, PARTS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """The statistics of `LINES` lines over all their parts, (F, n_parts, ...), and over those in `out` if it continues."""
    lines = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    valid = lines < n_lines
    sum_a, top_a, hard, sum_b, top_b, gap = _empty(LINES)
    if CONTINUES:
        sum_a, top_a, hard, sum_b, top_b, gap = _get(out + lines, out_fields_stride, valid, TEACHER, HARD, STATIC)
    for first in range(0, n_parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        at = parts_in + part.to(tl.int64) * parts_stride + lines[None, :]
        more_a, part_top_a, more_hard, more_b, part_top_b, more_gap = _get(
            at, parts_fields_stride, (part < n_parts) & valid[None, :], TEACHER, HARD, STATIC
        )
        if not STATIC:
            new_top_a = tl.maximum(top_a, tl.max(part_top_a, 0))
            new_top_b = tl.maximum(top_b, tl.max(part_top_b, 0)) if TEACHER else new_top_a
            sum_a, hard, sum_b, gap = _recentred(
                sum_a, hard, sum_b, gap, top_a - new_top_a, top_b - new_top_b, sharpen, TEACHER, HARD
            )  # fmt: skip
            more_a, more_hard, more_b, more_gap = _recentred(
                more_a, more_hard, more_b, more_gap,
                part_top_a - new_top_a[None, :], part_top_b - new_top_b[None, :], sharpen, TEACHER, HARD,
            )  # fmt: skip
            top_a, top_b = new_top_a, new_top_b
        sum_a += tl.sum(more_a, 0)
        if HARD:
            hard += tl.sum(more_hard, 0)
        if TEACHER:
            sum_b += tl.sum(more_b, 0)
            gap += tl.sum(more_gap, 0)
    _put(out + lines, out_fields_stride, valid, sum_a, top_a, hard, sum_b, top_b, gap, TEACHER, HARD, STATIC)


class _Fields(NamedTuple):
    """Which statistics of a line a launch yields, in this order: sum_a, (sum_b, gap), (max_a, (max_b)), (sum_hard)."""

    teacher: bool
    hard: bool
    static: bool

    @property
    def number(self) -> int:
        return (3 if self.teacher else 1) + (0 if self.static else 1 + self.teacher) + self.hard

    def switches(self) -> dict[str, bool]:
        return {"TEACHER": self.teacher, "HARD": self.hard, "STATIC": self.static}

    def natural(self, found_Fn: Tensor, centres: tuple[Tensor, Tensor]) -> Normalisers:
        """In natural units. centres: the references of a and b in static mode, ()."""
        found = iter(found_Fn.unbind(0))
        sum_a = next(found)
        sum_b, gap = (next(found), next(found) * LN_2) if self.teacher else (None, None)
        tops = [(centre.expand_as(sum_a) if self.static else next(found)) * LN_2 for centre in centres[: 1 + self.teacher]]
        sum_hard = next(found) if self.hard else None
        above = [None if field is None else field[None] for field in (tops[1] if self.teacher else None, sum_b, gap)]
        return Normalisers(tops[0], sum_a, sum_hard, *above)


def _fold(parts_FPn: Tensor, out_Fn: Tensor, sharpen: float, fields: _Fields, *, continues: bool) -> None:
    lines, block = out_Fn.shape[1], 64
    _fold_kernel[(triton.cdiv(lines, block),)](
        parts_FPn, out_Fn, parts_FPn.shape[1], lines, parts_FPn.stride(0), parts_FPn.stride(1), out_Fn.stride(0), sharpen,
        **fields.switches(), CONTINUES=continues, PARTS=16, LINES=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _launch(
    student: Operands, teacher: Operands | None, sharpen: float | None, diagonal: int | None, static: bool, tiles: Tiles | None
) -> tuple[Normalisers, Normalisers, Tensor | None]:
    """`stripe_statistics` with at most one teacher."""
    fields = _Fields(teacher is not None, sharpen is not None, static)
    tiles = tiles or fitting(PAIR_TILES if fields.teacher or fields.hard else SINGLE_TILES, student, teacher or student)
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
            sharpen=1.0 if sharpen is None else float(sharpen), diagonal=diagonal or 0, DIAGONAL=diagonal is not None,
            **fields.switches(), **launch_options(student, teacher or student, tiles),
            # A product fused with a sum here but not there would break "teacher equal to student: exactly 0".
            enable_fp_fusion=False,
        )  # fmt: skip
        start = first * tiles.block_n
        stop = min(start + wide * tiles.block_n, columns)
        _fold(row_parts[:, :wide], of_rows, sharpen or 1.0, fields, continues=first > 0)
        _fold(column_parts[:, :, : stop - start], of_columns[:, start:stop], sharpen or 1.0, fields, continues=False)
    units = ((side.gain.float() * LOG2_E - STATIC_ROOM).clamp_min(0) for side in (student, teacher or student))
    centres = (next(units), next(units))
    return (
        fields.natural(of_rows, centres),
        fields.natural(of_columns, centres),
        None if diagonal_B is None else diagonal_B * LN_2,
    )


def stripe_statistics(
    student: Logits,
    teachers: Sequence[Logits],
    sharpen: float | None,
    *,
    diagonal: int | None,
    static: bool,
    tiles: Tiles | None = None,
) -> tuple[Normalisers, Normalisers, Tensor | None]:
    """Statistics of the rows (B,) and of the columns (M,) of a stripe of logits, and the student's logits on its diagonal, (B,).

    sharpen: the temperature, where the normaliser at temperature 1 is wanted besides; otherwise None.
    diagonal: column `row + diagonal` belongs to a row, for all B rows; None: no diagonal is returned.
    static: no running maximum; the references reported are constants. Only where no |logit| exceeds `STATIC_LIMIT`, without `sharpen`.
    tiles: None for the defaults measured at compile time (`tests/kernels/test_triton_compile.py`).
    Matrices float32, float16 or bfloat16; everything is summed in float32. A teacher equal to the student diverges by exactly 0.
    Scratch: `SLAB_BYTES` for the rows' parts, less for the columns'. Nothing waits for the device.
    """
    assert not (static and sharpen is not None), "the normaliser at temperature 1 spans more than one offset can serve"
    assert diagonal is None or 0 <= diagonal <= len(student.right_ND) - len(student.left_BD)
    own = Operands.of(student)
    with torch.cuda.device_of(own.left_BD):
        found = [
            _launch(own, Operands.of(teacher), sharpen if first else None, diagonal if first else None, static, tiles)
            for teacher, first in zip(teachers, (True, *[False] * len(teachers)), strict=False)
        ] or [_launch(own, None, sharpen, diagonal, static, tiles)]
    return _together([rows for rows, _, _ in found]), _together([columns for _, columns, _ in found]), found[0][2]


def _together(found: Sequence[Normalisers]) -> Normalisers:
    """One line's statistics from a launch a teacher; each launch formed the same student logits."""
    if len(found) == 1:
        return found[0]
    above = (torch.cat([getattr(one, field) for one in found]) for field in ("max_b", "sum_b", "gap"))
    return found[0]._replace(**dict(zip(("max_b", "sum_b", "gap"), above, strict=True)))
