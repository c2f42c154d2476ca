"""The Triton slope against float64, interpreted on the CPU and compiled where there is a GPU.

Legend: c rows of a panel, M columns, K teachers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megakd_kernels.softmax_stats import SlopeWeights, UpstreamGradients
from support.triton_cases import DEVICES, Stripe, rounding, stripe, truth

pytest.importorskip("triton")

from megakd_kernels.triton.slope import slope_panel
from megakd_kernels.triton.tiles import Tiles

SMALL = Tiles(16, 16, 16, 4, 2)

pytestmark = pytest.mark.parametrize("device", DEVICES)


def sides(case: Stripe, hard_temperature: float | None, upstream: tuple[float, float] = (1.0, 0.5)) -> tuple[SlopeWeights, SlopeWeights]:
    """Of the true statistics, in float32: rounded as they are, both the kernel and the truth start from them."""
    weights = UpstreamGradients(torch.tensor(upstream[0]), torch.tensor(upstream[1]), torch.tensor(1.0))
    rows, columns = (SlopeWeights.of(lines, weights, 1.0) for lines in truth(case, hard_temperature))
    device = case.student.left_BD.device
    return tuple(SlopeWeights(*(None if field is None else field.float().to(device) for field in side)) for side in (rows, columns))


def true_slope(case: Stripe, both: tuple[SlopeWeights, SlopeWeights], hard_temperature: float | None, diagonal_weight: float) -> Tensor:
    a, b = case.doubles()
    slope = torch.zeros_like(a)
    for side, dim in zip(both, (1, 0), strict=True):
        m_a, student_weight, hard_weight, m_b, teacher_weight = (
            None if field is None else field.cpu().double().unsqueeze(-1 if dim else -2) for field in side
        )
        slope += student_weight * (a - m_a).exp()
        if hard_temperature is not None:
            slope += hard_weight * (hard_temperature * (a - m_a)).exp()
        for place, target in enumerate(b):
            slope += teacher_weight[place] * (target - m_b[place]).exp()
    if case.diagonal is not None:
        slope.diagonal(case.diagonal).sub_(diagonal_weight)
    return slope


def found(
    case: Stripe,
    both: tuple[SlopeWeights, SlopeWeights],
    hard_temperature: float | None,
    diagonal_weight: float,
    out: torch.dtype = torch.float32,
    tiles: Tiles | None = SMALL,
) -> Tensor:
    """Written into a wider panel, whose other columns stay as they were."""
    rows, columns = len(case.student.left_BD), len(case.student.right_ND)
    panel = torch.full((rows, columns + 3), 7.0, dtype=out, device=case.student.left_BD.device)
    diagonal = {"diagonal": case.diagonal, "diagonal_weight": torch.tensor(diagonal_weight, device=panel.device)}
    out_cM = panel[:, :columns]
    slope_panel(case.student, case.teachers, *both, hard_temperature=hard_temperature, **diagonal, out_cM=out_cM, tiles=tiles)
    assert (panel[:, columns:] == 7).all()
    return panel[:, :columns].cpu().double()


def assert_near_the_truth(
    case: Stripe,
    hard_temperature: float | None = None,
    *,
    upstream: tuple[float, float] = (1.0, 0.5),
    out: torch.dtype = torch.float32,
    tiles: Tiles | None = SMALL,
) -> None:
    both = sides(case, hard_temperature, upstream)
    diagonal_weight = 4096.0
    true = true_slope(case, both, hard_temperature, diagonal_weight)
    # Each term is wrong by the roundings of its exponent (logit, reference and the weight's 2^12), and it may cancel with others.
    exponent = rounding(case) * (2 if hard_temperature is None else 2 + hard_temperature) + 12 * 2**-24
    positive = tuple(side._replace(teacher=None if side.teacher is None else -side.teacher) for side in both)
    size = true_slope(case, positive, hard_temperature, -diagonal_weight)
    allowed = 4 * exponent * size + torch.finfo(out).eps * true.abs() + torch.finfo(out).tiny
    assert ((found(case, both, hard_temperature, diagonal_weight, out, tiles) - true).abs() <= allowed).all()


@pytest.mark.parametrize(("rows", "columns", "diagonal"), [(1, 1, 0), (2, 37, 5), (37, 37, 0), (32, 129, 97), (129, 32, None), (48, 64, 0)])
def test_slopes_of_any_shape_are_those_of_float64(device: str, rows: int, columns: int, diagonal: int | None) -> None:
    assert_near_the_truth(stripe(rows, columns, diagonal=diagonal, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("widths", [(48, 200), (200, 48), (50, 33), (48, 64, 33)])
def test_slopes_are_rounded_once_to_the_dtype_of_the_panel(device: str, dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    assert_near_the_truth(stripe(37, 45, dtype=dtype, widths=widths, device=device), out=dtype)


@pytest.mark.parametrize("hard_temperature", [None, 0.05, 2.0, 20.0])
@pytest.mark.parametrize("gain", [0.05, 14.0, 100.0, 2000.0])
def test_slopes_hold_at_any_gain_and_temperature(device: str, gain: float, hard_temperature: float | None) -> None:
    assert_near_the_truth(stripe(37, 45, gain=gain, device=device), hard_temperature)


@pytest.mark.parametrize("hard_temperature", [None, 2.0])
@pytest.mark.parametrize("teachers", [0, 1, 2, 3])
def test_any_number_of_teachers_adds_up(device: str, teachers: int, hard_temperature: float | None) -> None:
    for out in (torch.float32, torch.float16):
        assert_near_the_truth(stripe(37, 45, widths=(48, 80, 56, 64)[: 1 + teachers], device=device), hard_temperature, out=out)


@pytest.mark.parametrize("upstream", [(-1.0, -0.5), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.5)])
@pytest.mark.parametrize("hard_temperature", [None, 2.0])
def test_weights_of_either_sign_and_zero_count(device: str, upstream: tuple[float, float], hard_temperature: float | None) -> None:
    case = stripe(37, 45, device=device)
    both = sides(case, hard_temperature, upstream)
    expected = true_slope(case, both, hard_temperature, 1.0)
    torch.testing.assert_close(found(case, both, hard_temperature, 1.0), expected, rtol=0, atol=2e-6 * 4096)


@pytest.mark.parametrize("tiles", [Tiles(16, 32, 32, 4, 2), Tiles(64, 16, 16, 4, 2), None])
def test_tiles_change_nothing(device: str, tiles: Tiles | None) -> None:
    assert_near_the_truth(stripe(70, 131, device=device), tiles=tiles)


def test_a_teacher_equal_to_the_student_leaves_no_slope(device: str) -> None:
    case = stripe(37, 53, device=device, diagonal=None)
    case = case._replace(teachers=[case.student])
    both = sides(case, None, (1.0, 0.0))
    assert found(case, both, None, 0.0).abs().max() <= 4096 * 2**-22


def test_slopes_repeat_bitwise(device: str) -> None:
    case = stripe(37, 53, widths=(48, 80, 64), device=device)
    both = sides(case, 2.0)
    assert torch.equal(found(case, both, 2.0, 1.0), found(case, both, 2.0, 1.0))
