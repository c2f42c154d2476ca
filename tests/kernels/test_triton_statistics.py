"""The Triton statistics against float64, interpreted on the CPU and compiled where there is a GPU.

Legend: B rows, M columns, n lines of one side, K teachers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megakd_kernels.softmax_stats import SoftmaxStats, merge
from support.triton_cases import DEVICES, Stripe, rounding, stripe, truth

pytest.importorskip("triton")

from megakd_kernels.triton import statistics as triton_statistics
from megakd_kernels.triton.statistics import STATIC_LIMIT, stripe_statistics
from megakd_kernels.triton.tiles import Tiles

SMALL = Tiles(16, 16, 16, 4, 2)
# Both sides' numbers pass through a few roundings of the largest logit each, and through exponentials of it.
ROUNDINGS = 6

pytestmark = pytest.mark.parametrize("device", DEVICES)


def found(
    case: Stripe, hard_temperature: float | None = None, *, static: bool = False, tiles: Tiles = SMALL
) -> tuple[SoftmaxStats, SoftmaxStats, Tensor | None]:
    ours = stripe_statistics(case.student, case.teachers, hard_temperature, diagonal=case.diagonal, static=static, tiles=tiles)
    rows, columns = (SoftmaxStats(*(None if field is None else field.cpu().double() for field in side)) for side in ours[:2])
    return rows, columns, None if ours[2] is None else ours[2].cpu().double()


def assert_near_the_truth(case: Stripe, hard_temperature: float | None = None, *, static: bool = False, tiles: Tiles = SMALL) -> None:
    rows, columns, diagonal_B = found(case, hard_temperature, static=static, tiles=tiles)
    unit = ROUNDINGS * rounding(case)
    for ours, true in zip((rows, columns), truth(case, hard_temperature), strict=True):
        near = {"rtol": 0, "atol": unit}
        torch.testing.assert_close(ours.m_a + ours.l_a.log(), true.m_a + true.l_a.log(), **near)
        if not static:
            torch.testing.assert_close(ours.m_a, true.m_a, **near)
        if hard_temperature is None:
            assert ours.l_hard is None
        else:
            logs = [side.m_a * hard_temperature + side.l_hard.log() for side in (ours, true)]
            torch.testing.assert_close(*logs, rtol=0, atol=unit * (1 + hard_temperature))
        if case.teachers:
            assert ours.m_b.shape == true.m_b.shape
            torch.testing.assert_close(ours.m_b + ours.l_b.log(), true.m_b + true.l_b.log(), **near)
            torch.testing.assert_close(ours.divergence(), true.divergence(), rtol=ROUNDINGS * 1e-7, atol=2 * unit)
        else:
            assert (ours.m_b, ours.l_b, ours.cross_term) == (None, None, None)
    if case.diagonal is None:
        assert diagonal_B is None
    else:
        torch.testing.assert_close(diagonal_B, case.doubles()[0].diagonal(case.diagonal), rtol=0, atol=unit)


@pytest.mark.parametrize("static", [False, True], ids=["online", "static"])
@pytest.mark.parametrize(("rows", "columns", "diagonal"), [(1, 1, 0), (2, 37, 5), (37, 37, 0), (32, 129, 97), (129, 32, None), (48, 64, 0)])
def test_statistics_of_any_shape_are_those_of_float64(device: str, rows: int, columns: int, diagonal: int | None, static: bool) -> None:
    assert_near_the_truth(stripe(rows, columns, diagonal=diagonal, device=device), static=static)


@pytest.mark.parametrize("static", [False, True], ids=["online", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("widths", [(48, 200), (200, 48), (50, 33)])
def test_statistics_take_any_dtype_and_widths(device: str, dtype: torch.dtype, widths: tuple[int, ...], static: bool) -> None:
    assert_near_the_truth(stripe(37, 45, dtype=dtype, widths=widths, device=device), static=static)


def test_sides_of_different_dtypes_are_multiplied_in_float32(device: str) -> None:
    case = stripe(20, 24, device=device)
    mixed = case.student._replace(left_BD=case.student.left_BD.half())
    assert_near_the_truth(case._replace(student=mixed))


@pytest.mark.parametrize("hard_temperature", [None, 0.05, 2.0, 20.0])
@pytest.mark.parametrize("gain", [0.05, 14.0, 100.0, 2000.0])
def test_online_statistics_hold_at_any_gain_and_temperature(device: str, gain: float, hard_temperature: float | None) -> None:
    assert_near_the_truth(stripe(37, 45, gain=gain, device=device), hard_temperature)


@pytest.mark.parametrize("gain", [0.05, 14.0, 62.0, 65.0, STATIC_LIMIT])
def test_static_statistics_hold_up_to_the_limit(device: str, gain: float) -> None:
    assert_near_the_truth(stripe(37, 45, gain=gain, device=device), static=True)


@pytest.mark.parametrize("static", [False, True], ids=["online", "static"])
@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_lines_of_extreme_cosines_neither_overflow_nor_vanish(device: str, static: bool, cosine: float) -> None:
    case = stripe(20, 33, gain=STATIC_LIMIT, device=device)
    one = torch.zeros(1, 48, device=device)
    one[0, 0] = 1.004  # a norm that bfloat16 may round to
    extreme = case.student._replace(left_BD=one.expand(20, 48) * cosine, right_ND=one.expand(33, 48).contiguous())
    assert_near_the_truth(case._replace(student=extreme), static=static)
    rows, columns, _ = found(case._replace(student=extreme), static=static)
    for side in (rows, columns):
        assert ((2.0**13 / side.l_a.float()).isfinite() & (side.l_a > 0)).all()


@pytest.mark.parametrize("static", [False, True], ids=["online", "static"])
@pytest.mark.parametrize(("teachers", "hard_temperature"), [(0, None), (0, 2.0), (2, None), (2, 2.0), (3, None)])
def test_any_number_of_teachers_is_summarised(device: str, teachers: int, hard_temperature: float | None, static: bool) -> None:
    if static and hard_temperature is not None:
        with pytest.raises(AssertionError, match="offset"):
            found(stripe(4, 4, device=device), hard_temperature, static=True)
        return
    assert_near_the_truth(stripe(37, 45, widths=(48, 80, 56, 64)[: 1 + teachers], device=device), hard_temperature, static=static)


@pytest.mark.parametrize("static", [False, True], ids=["online", "static"])
@pytest.mark.parametrize("tiles", [Tiles(16, 32, 16, 4, 2), Tiles(32, 16, 32, 4, 2), Tiles(64, 64, 16, 4, 2)])
def test_slabs_and_macros_change_nothing(device: str, static: bool, tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs of columns, whose rows are folded into those before; macros of several row tiles, the last one shorter."""
    monkeypatch.setattr(triton_statistics, "SLAB_BYTES", 4 * 5 * 131 * 3)
    monkeypatch.setattr(triton_statistics, "PROGRAMS", 4)
    assert_near_the_truth(stripe(131, 150, device=device), static=static, tiles=tiles)
    if not static:
        assert_near_the_truth(stripe(131, 150, device=device), 2.0, tiles=tiles)


def test_default_tiles_serve_halves_and_float32(device: str) -> None:
    for dtype in (torch.float32, torch.float16):
        for static in (False, True):
            case = stripe(70, 70, dtype=dtype, device=device)
            ours = stripe_statistics(case.student, case.teachers, None, diagonal=0, static=static)
            true = truth(case, None)
            for side in (0, 1):
                torch.testing.assert_close(ours[side].divergence().cpu().double(), true[side].divergence(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("static", [False, True], ids=["online", "static"])
@pytest.mark.parametrize("gain", [14.0, 69.0])
def test_a_teacher_equal_to_the_student_diverges_by_exactly_zero(device: str, static: bool, gain: float) -> None:
    case = stripe(37, 53, gain=gain, device=device)
    rows, columns, _ = stripe_statistics(case.student, [case.student], None, diagonal=0, static=static, tiles=SMALL)
    assert not rows.divergence().any()
    assert not columns.divergence().any()


@pytest.mark.parametrize("static", [False, True], ids=["online", "static"])
def test_identical_rows_have_identical_statistics(device: str, static: bool) -> None:
    case = stripe(37, 45, device=device)
    same = [one._replace(left_BD=one.left_BD[:1].expand_as(one.left_BD)) for one in (case.student, *case.teachers)]
    rows, columns, _ = found(Stripe(same[0], same[1:], None), static=static)
    for field in rows:
        if field is not None:
            torch.testing.assert_close(field, field[..., :1].expand_as(field), rtol=1e-5, atol=1e-5)
    assert_near_the_truth(Stripe(same[0], same[1:], None), static=static)
    torch.testing.assert_close(columns.divergence(), torch.zeros(45, dtype=torch.float64), rtol=0, atol=1e-5)


def test_one_very_large_logit_drowns_nothing_elsewhere(device: str) -> None:
    case = stripe(37, 45, gain=1.0, device=device)
    case.student.left_BD[5] = 1e4 * case.student.right_ND[7]
    rows, columns, _ = found(case)
    true_rows, true_columns = truth(case, None)
    for ours, true, large in ((rows, true_rows, 5), (columns, true_columns, 7)):
        assert ours.l_a[large] == 1
        others = torch.arange(len(ours.l_a)) != large
        if ours is rows:
            torch.testing.assert_close(ours.lines(others).divergence(), true.lines(others).divergence(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.divergence(), true.divergence(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("static", [False, True], ids=["online", "static"])
def test_statistics_of_two_halves_merge_into_those_of_the_whole(device: str, static: bool) -> None:
    case = stripe(20, 40, device=device, diagonal=None)
    whole, _, _ = found(case, static=static)
    halves = []
    for part in (slice(16), slice(16, 40)):
        student, teacher = (logits._replace(right_ND=logits.right_ND[part]) for logits in (case.student, case.teachers[0]))
        halves.append(found(Stripe(student, [teacher], None), static=static)[0])
    merged = merge([halves[0], halves[1]], None)
    torch.testing.assert_close(merged.divergence(), whole.divergence(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.m_a + merged.l_a.log(), whole.m_a + whole.l_a.log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("static", [False, True], ids=["online", "static"])
def test_strided_embeddings_are_read_where_they_lie(device: str, static: bool) -> None:
    case = stripe(20, 24, device=device)
    apart = torch.cat([case.student.left_BD, torch.full_like(case.student.left_BD, torch.nan)], 1)[:, :48]
    turned = case.student.right_ND.T.contiguous().T
    assert_near_the_truth(case._replace(student=case.student._replace(left_BD=apart, right_ND=turned)), static=static)


@pytest.mark.parametrize("static", [False, True], ids=["online", "static"])
def test_statistics_repeat_bitwise(device: str, static: bool) -> None:
    case = stripe(37, 53, device=device)
    for one, two in zip(found(case, static=static)[:2], found(case, static=static)[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a is not None)
