"""Patch tokens on their grid: which grid two towers have in common, and how tokens come to it.

Legend: B images, h x w a grid of patches, C a block's width.
"""

from __future__ import annotations

import torch
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


def averaged_shape(patches: Patches, target: Grid | None, key: str) -> Patches:
    """What `averaged` makes of patch tokens; they themselves for None.

    Raises ValueError, naming `key`, for tokens without a grid, for a target that is finer, and for one of another aspect.
    """
    if target is None:
        return patches
    named = f"{key} = {list(target)}"
    if patches.grid is None:
        raise ValueError(f"{named}: the teacher's {patches.count} patch tokens form no grid; choose a tower with square patches")
    (height, width), (h, w) = patches.grid, target
    if h > height or w > width:
        raise ValueError(f"{named}: the teacher's grid has {height} x {width} patches alone, and averages are of whole ones; lower it")
    if h * width != w * height:
        raise ValueError(
            f"{named}: the teacher's grid of {height} x {width} patches has another aspect; give rows and columns in the proportion of "
            f"{height} to {width}"
        )
    return Patches(h * w, patches.width, target)


def averaged(map_BhwC: Tensor, target: Grid | None) -> Tensor:
    """(B, *target, C): the mean over the area of each cell, where a patch on a border counts by its share; the map itself for None."""
    if target is None or map_BhwC.shape[1:3] == target:
        return map_BhwC
    rows, columns = (_shares(size, cells) for size, cells in zip(map_BhwC.shape[1:3], target, strict=True))
    shares = torch.kron(rows, columns).to(map_BhwC.device, torch.float32)
    mean_BVC = shares @ map_BhwC.flatten(1, 2).float()
    return mean_BVC.view(-1, *target, map_BhwC.shape[3]).to(map_BhwC.dtype)


def _shares(size: int, cells: int) -> Tensor:
    """(cells, size) float64 with rows of sum 1: how much of each cell every patch is, along one side."""
    borders, patch = torch.arange(cells + 1, dtype=torch.float64) * size / cells, torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(borders[1:, None], patch + 1) - torch.maximum(borders[:-1, None], patch)
    return overlap.clamp(min=0) * cells / size
