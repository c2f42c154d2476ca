"""Panels of logits, c rows of the similarity matrix by all N columns, the largest tensors of the chunked backend; and their products.

Legend: B local rows, N columns (rows of all ranks), D width, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of one panel by device; five live in the forward pass, four in the backward. On the CPU time hardly depends on it (N = 4096,
# widths 256 and 512, one core: 1 MB 1.17 s, 4 to 16 MB 1.0 s, 64 MB 1.24 s). CUDA is not measured: 64 MB is 512 rows at N = 32768.
PANEL_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}

# Bytes of a product that torch cannot add to a sum in one call, and so computes in strips: 16,384 rows at width 512.
STRIP_BYTES = 32 << 20


def chunk_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows of logits fill one panel: at least 1, at most all."""
    budget = PANEL_BYTES.get(device.type, PANEL_BYTES["cuda"])
    return max(1, min(rows, budget // (columns * dtype.itemsize)))


def chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk))


def scratch_panels(count: int, chunk: int, like: Logits, columns: int | None = None) -> list[Tensor]:
    """(c, N) panels for one pass, or (c, columns), reused from chunk to chunk.

    Not allocated for each chunk: glibc 2.36 does not reuse freed aligned blocks of one size reliably, and the peak at N = 6144 varied
    between 150 and 640 MB.
    """
    shape = (min(chunk, like.left_BD.shape[0]), columns or like.right_ND.shape[0])
    return [like.gain.new_empty(shape) for _ in range(count)]


def _has_half_product(left: Tensor, right: Tensor) -> bool:
    """Whether torch multiplies these halves into float32 (`out_dtype`, torch >= 2.8): on CUDA; the CPU of torch 2.14 does not."""
    return left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16)


@cache
def _has_half_addmm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of halves to a float32 sum in one call. Older versions want the sum in halves too; tried once."""
    total, half = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in total's dtype, without a second matrix of total's size."""
    if not (_has_half_product(left, right) and total.dtype == torch.float32):
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    elif _has_half_addmm(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        # in strips: the product of 131,072 texts of width 768 would take 403 MB more
        for rows in chunks(len(total), max(1, STRIP_BYTES // (total.shape[1] * total.itemsize))):
            total[rows] += torch.mm(left[rows], right, out_dtype=torch.float32)


class Logits(NamedTuple):
    """gain * left @ right.T, formed some rows at a time in the dtype of `gain` (float32 or float64)."""

    left_BD: Tensor
    right_ND: Tensor
    gain: Tensor

    @classmethod
    def of(cls, left_BD: Tensor, right_ND: Tensor, gain: Tensor) -> Logits:
        """Where torch has no product of halves into float32, the right side is widened here, once instead of once a chunk."""
        if _has_half_product(left_BD, right_ND) and gain.dtype == torch.float32:
            return cls(left_BD, right_ND, gain)
        return cls(left_BD, right_ND.to(gain.dtype), gain)

    def rows(self, selected: slice, out: Tensor) -> Tensor:
        """(c, N), in the first c rows of `out`."""
        left_cD = self.scaled_rows(selected)
        return self.times(left_cD, slice(None), out[: len(left_cD)])

    def scaled_rows(self, selected: slice) -> Tensor:
        """(c, D), as `times` takes them: multiplied by the gain already, unless they are multiplied as halves."""
        left_cD = self.left_BD[selected]
        return left_cD.to(self.gain.dtype) * self.gain if self.right_ND.dtype == self.gain.dtype else left_cD

    def times(self, left_cD: Tensor, columns: slice, out_cC: Tensor) -> Tensor:
        """The logits of the rows that `scaled_rows` gave and of some columns, in `out_cC`."""
        right_CD = self.right_ND[columns]
        if right_CD.dtype == self.gain.dtype:
            return torch.mm(left_cD, right_CD.T, out=out_cC)
        return torch.mm(left_cD, right_CD.T, out_dtype=self.gain.dtype, out=out_cC).mul_(self.gain)
