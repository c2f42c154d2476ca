"""Patch tokens averaged to a coarser grid: each cell is the mean of its area, whatever the borders cut; and grids that cannot be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megakd.models.grids import averaged, averaged_shape
from megakd.models.patches import Patches


def _by_splitting(map_BhwC: Tensor, target: tuple[int, int]) -> Tensor:
    """In float64: every patch is split into so many equal ones that each cell holds whole ones, whose plain mean it is."""
    (height, width), (h, w) = map_BhwC.shape[1:3], target
    tall, wide = math.lcm(height, h), math.lcm(width, w)
    fine = map_BhwC.double().repeat_interleave(tall // height, 1).repeat_interleave(wide // width, 2)
    return fine.unflatten(2, (w, wide // w)).unflatten(1, (h, tall // h)).mean(dim=(2, 4))


@pytest.mark.parametrize(
    ("grid", "target"),
    [((4, 4), (2, 2)), ((5, 5), (2, 2)), ((14, 14), (4, 4)), ((16, 16), (7, 7)), ((4, 6), (2, 3)), ((6, 9), (4, 6)), ((3, 3), (1, 1))],
)
def test_a_cell_is_the_mean_of_its_area(grid: tuple[int, int], target: tuple[int, int]) -> None:
    map_BhwC = torch.randn(3, *grid, 5, generator=torch.Generator().manual_seed(1))
    found = averaged(map_BhwC, target)
    assert found.shape == (3, *target, 5)
    torch.testing.assert_close(found.double(), _by_splitting(map_BhwC, target), rtol=1e-5, atol=1e-6)


def test_a_cell_between_two_patches_has_a_half_of_each() -> None:
    """Three patches in a row on two cells; torch's own adaptive pooling counts the middle one whole in both."""
    found = averaged(torch.tensor([3.0, 6.0, 30.0]).view(1, 1, 3, 1).expand(1, 3, 3, 1), (2, 2))
    torch.testing.assert_close(found[0, 0, :, 0], torch.tensor([3 * 2 / 3 + 6 / 3, 6 / 3 + 30 * 2 / 3]))


@pytest.mark.parametrize("target", [None, (4, 4)])
def test_tokens_that_are_there_already_are_left_as_they_are(target: tuple[int, int] | None) -> None:
    map_BhwC = torch.randn(2, 4, 4, 3)
    assert averaged(map_BhwC, target) is map_BhwC


def test_sixteen_bit_tokens_are_averaged_in_32() -> None:
    map_BhwC = torch.randn(2, 16, 16, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = averaged(map_BhwC, (3, 3))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, _by_splitting(map_BhwC.float(), (3, 3)).bfloat16())


def test_the_shape_told_beforehand_is_that_of_the_averages() -> None:
    assert averaged_shape(Patches(36, 12, (4, 9)), None, "k") == Patches(36, 12, (4, 9))
    assert averaged_shape(Patches(36, 12, (6, 6)), (4, 4), "k") == Patches(16, 12, (4, 4))


@pytest.mark.parametrize(
    ("patches", "target", "told"),
    [
        (Patches(16, 12, (4, 4)), (5, 5), r"teacher\.patch_grid = \[5, 5\]: the teacher's grid has 4 x 4 patches alone.*lower it"),
        (Patches(16, 12, (4, 4)), (4, 2), r"teacher\.patch_grid = \[4, 2\]: .*4 x 4 patches has another aspect.*proportion of 4 to 4"),
        (Patches(17, 12, None), (2, 2), r"teacher\.patch_grid = \[2, 2\]: the teacher's 17 patch tokens form no grid"),
    ],
)
def test_a_grid_that_is_none_of_the_teachers_is_one_message(patches: Patches, target: tuple[int, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        averaged_shape(patches, target, "teacher.patch_grid")
