"""Logits for the tests of single Triton kernels, and the same numbers in float64.

Legend: B rows, M columns, D width, c rows of a panel, K teachers.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from megakd_kernels.panels import Logits
from megakd_kernels.softmax_stats import SoftmaxStats, panel_stats
from support.loss_cases import GPU, INTERPRETED

DEVICES = [pytest.param("cpu", id="interpreted", marks=INTERPRETED), pytest.param("cuda", id="CUDA", marks=GPU)]


class Stripe(NamedTuple):
    """Logits of a student and of its teachers, and where the diagonal begins."""

    student: Logits
    teachers: list[Logits]
    diagonal: int | None

    def doubles(self) -> tuple[Tensor, list[Tensor]]:
        """(B, M) student, and each teacher, formed in float64 on the CPU."""
        a, *b = ((one.gain.double() * (one.left_BD.double() @ one.right_ND.double().T)).cpu() for one in (self.student, *self.teachers))
        return a, b


def stripe(
    rows: int,
    columns: int,
    *,
    gain: float = 14.0,
    widths: tuple[int, ...] = (48, 80),
    dtype: torch.dtype = torch.float32,
    diagonal: int | None = 0,
    device: str = "cpu",
) -> Stripe:
    """Unit vectors; one width for the student and one more for each teacher, whose gain differs."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    made = []
    for place, width in enumerate(widths):
        left, right = (
            normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1).to(dtype).to(device) for n in (rows, columns)
        )
        made.append(Logits(left, right, torch.tensor(gain / (1 + place / 8), dtype=torch.float32, device=device)))
    return Stripe(made[0], made[1:], diagonal)


def truth(case: Stripe, hard_temperature: float | None) -> tuple[SoftmaxStats, SoftmaxStats]:
    """Rows' and columns' statistics in float64."""
    a, b = case.doubles()
    return panel_stats(a.clone(), b, hard_temperature, [torch.empty_like(a) for _ in range(3)])


def rounding(case: Stripe) -> float:
    """One float32 rounding of the largest logit: the distance that no way of computing in float32 can stay below."""
    a, b = case.doubles()
    return torch.finfo(torch.float32).eps * (1 + max(float(one.abs().max()) for one in (a, *b)))
