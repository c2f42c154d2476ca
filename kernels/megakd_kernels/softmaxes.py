"""The softmaxes that make up the slope of a similarity loss, ready to be weighed and summed tile by tile.

Legend: n the lines of one side (rows or columns), K teachers.
a student logits, b_k teacher logits, both already divided by the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.normalisers import Normalisers

# Slopes are cast to half precision where the product takes halves. Their entries are at most 8, mostly near 1 / N:
# this gain keeps them inside float16 (8 * 2^12 < 65504, and 2^-24 / 2^12 is far below 1 / N). Exact in every other dtype.
SLOPE_GAIN = 2.0**12


class Pull(NamedTuple):
    """Upstream gradients as weights of the softmaxes in the slope, at most 1 in size each, and the unit taken out of them."""

    kd: Tensor
    hard: Tensor
    unit: Tensor

    @classmethod
    def of(cls, grad_kd: Tensor, grad_hard: Tensor, temperature: float) -> Pull:
        kd = grad_kd * temperature
        unit = torch.maximum(kd.abs(), grad_hard.abs()).clamp_min(torch.finfo(kd.dtype).tiny)
        return cls(kd / unit, grad_hard / unit, unit)


class Softmaxes(NamedTuple):
    """What one side adds to the slope at a line:

    soft * exp(a - top_a) + hard * exp(sharpen * (a - top_a)) + sum over k of teach_k * exp(b_k - top_b_k).

    top_a, soft: (n,). hard: (n,), or None where `soft` covers it. top_b, teach: (K, n), or None without a teacher; teach is negative.
    """

    top_a: Tensor
    soft: Tensor
    hard: Tensor | None
    top_b: Tensor | None
    teach: Tensor | None

    @classmethod
    def of(cls, lines: Normalisers, pull: Pull, direction: float) -> Softmaxes:
        """direction: the weight of this side, 1 where rows and columns count alike."""
        kd, hard = pull.kd * (direction * SLOPE_GAIN), pull.hard * (direction * SLOPE_GAIN)
        sharp = None if lines.sum_hard is None else hard / lines.sum_hard
        soft = (kd + hard if sharp is None else kd) / lines.sum_a
        if lines.sum_b is None:
            return cls(lines.max_a, soft, sharp, None, None)
        return cls(lines.max_a, soft, sharp, lines.max_b, -kd / (len(lines.sum_b) * lines.sum_b))

    def lines(self, wanted: slice) -> Softmaxes:
        return Softmaxes(*(None if field is None else field[..., wanted] for field in self))  # type: ignore[arg-type]
