"""What the Triton kernels over tiles of the similarity matrix share: a tile's shape, its position, its logits.

Legend: B rows, M columns, D width. All exponentials are powers of 2: logits are multiplied by log2(e) as they are formed.
"""

# Triton has no types, and the parameters of its kernels are not Python values.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd_kernels.panels import Logits

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

# Row tiles computed together for each column tile: what 132 programs read at a time then stays in the 50 MB of a Hopper's L2.
GROUP = 8


class Tiles(NamedTuple):
    """Rows, columns and width of one step of a product, warps of a program and stages of its pipeline."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class Operands(NamedTuple):
    """Logits as a kernel takes them: two matrices of one dtype whose rows are contiguous."""

    left_BD: Tensor
    right_MD: Tensor
    gain: Tensor

    @classmethod
    def of(cls, logits: Logits) -> Operands:
        left, right, gain = logits
        if left.dtype != right.dtype:
            left, right = left.float(), right.float()
        left, right = (side if side.stride(1) == 1 else side.contiguous() for side in (left, right))
        return cls(left, right, gain)

    def arguments(self, name: str) -> dict[str, Any]:
        """By the names of the kernels' parameters."""
        left, right, gain = self
        return {
            f"{name}_left": left,
            f"{name}_right": right,
            f"{name}_gain": gain,
            f"{name}_width": left.shape[1],
            f"{name}_left_stride": left.stride(0),
            f"{name}_right_stride": right.stride(0),
        }


def launch_options(student: Operands, teacher: Operands, tiles: Tiles) -> dict[str, Any]:
    """The options that both kernels have in common."""
    rows, columns = len(student.left_BD), len(student.right_MD)
    return {
        "EVEN_LINES": rows % tiles.block_m == 0 and columns % tiles.block_n == 0,
        "EVEN_WIDTH": all(side.left_BD.shape[1] % tiles.block_k == 0 for side in (student, teacher)),
        # The interpreter of Triton 3.8 multiplies the bit patterns of bfloat16.
        "WIDEN": triton.knobs.runtime.interpret,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "GROUP_M": GROUP,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def tiles_for(tiles: Tiles, *operands: Operands) -> Tiles:
    """`tiles` for halves; smaller ones for float32, whose exact products do not run on the matrix units."""
    if all(side.left_BD.dtype in (torch.float16, torch.bfloat16) for side in operands):
        return tiles
    return tiles._replace(block_m=min(tiles.block_m, 64), block_n=min(tiles.block_n, 64), block_k=min(tiles.block_k, 16))


@triton.jit
def tile_position(program, down, across, GROUP_M: tl.constexpr):
    """Row and column of a program in a grid of `down` by `across`, in groups of `GROUP_M` rows by all columns."""
    group = program // (GROUP_M * across)
    first = group * GROUP_M
    height = tl.minimum(down - first, GROUP_M)
    within = program % (GROUP_M * across)
    return first + within % height, within // height


@triton.jit
def product(
    left, right, left_stride, right_stride, width, rows, columns, n_rows, n_columns,
    EVEN_WIDTH: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """left[rows] @ right[columns].T in float32. Lines beyond the last repeat the last, so the loop has no masks; the caller drops them."""
    row_at = tl.minimum(rows, n_rows - 1).to(tl.int64) * left_stride
    column_at = tl.minimum(columns, n_columns - 1).to(tl.int64) * right_stride
    steps = tl.arange(0, BLOCK_K)
    left_at = left + row_at[:, None] + steps[None, :]
    right_at = right + column_at[None, :] + steps[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_WIDTH:
            left_mk = tl.load(left_at)
            right_kn = tl.load(right_at)
        else:
            inside = steps < width - start
            left_mk = tl.load(left_at, mask=inside[None, :], other=0.0)
            right_kn = tl.load(right_at, mask=inside[:, None], other=0.0)
        if WIDEN:
            left_mk = left_mk.to(tl.float32)
            right_kn = right_kn.to(tl.float32)
        total = tl.dot(left_mk, right_kn, total, input_precision="ieee")
        left_at += BLOCK_K
        right_at += BLOCK_K
    return total
