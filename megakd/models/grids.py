"""Patch tokens on their grid: which grid two towers have in common, and how tokens come to it.

Legend: B images, h x w a grid of patches, C a block's width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megakd.models.patches import Patches

Grid = tuple[int, int]


def common_grid(student: Patches, teacher: Patches, key: str) -> Grid:
    """The smaller of two grids over the same image. Raises ValueError, naming `key`, for a tower without one and for unlike aspects."""
    for role, patches in (("student", student), ("teacher", teacher)):
        if patches.grid is None:
            raise ValueError(f"{key}: the {role}'s {patches.count} patch tokens form no grid; choose a tower with square patches")
    assert student.grid is not None
    assert teacher.grid is not None
    if student.grid[0] * teacher.grid[1] != student.grid[1] * teacher.grid[0]:
        raise ValueError(
            f"{key}: the student's grid of {student.grid[0]} x {student.grid[1]} patches and the teacher's of {teacher.grid[0]} x "
            f"{teacher.grid[1]} have unlike aspects, so their patches show other places; choose image sizes of one aspect"
        )
    return min(student.grid, teacher.grid)


def on_grid(map_BhwC: Tensor, target: Grid) -> Tensor:
    """(B, *target, C): bilinear, with the weights of all patches that a coarser one covers; the map itself where the grids are equal."""
    if map_BhwC.shape[1:3] == target:
        return map_BhwC
    resized = F.interpolate(map_BhwC.permute(0, 3, 1, 2).float(), target, mode="bilinear", antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1).to(map_BhwC.dtype)
