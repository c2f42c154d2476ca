"""From the vision tower's patches to the decoder's image tokens.

Legend: B images, V patches, C the tower's width, P image tokens of one image, H the decoder's width.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.patches import Patches


class Projector(nn.Module):
    """(B, V, C) -> (B, P, H): the patches averaged over a grid of P cells, then Linear, GELU, Linear.

    image_tokens: P, a square number; 0: every patch is one, without averaging.
    Raises ValueError for more cells than patches, and when the patches have no known grid.
    Source: the projector of LLaVA-1.5 (arXiv 2310.03744), mlp2x_gelu.
    """

    def __init__(self, patches: Patches, image_tokens: int, width: int) -> None:
        super().__init__()
        self.patches, self._side = patches, math.isqrt(image_tokens)
        self.image_tokens = image_tokens or patches.count
        if image_tokens:
            if patches.grid is None:
                raise ValueError(
                    f"decoder.image_tokens = {image_tokens}: the vision tower's {patches.count} patches form no grid to average over; "
                    f"set it to 0, for every patch"
                )
            if self._side > min(patches.grid):
                raise ValueError(
                    f"decoder.image_tokens = {image_tokens}: the vision tower has {patches.grid[0]} x {patches.grid[1]} patches at "
                    f"decoder.layer; set it to {min(patches.grid) ** 2} at most, or to 0 for every patch"
                )
        self.first, self.activation, self.last = nn.Linear(patches.width, width), nn.GELU(), nn.Linear(width, width)

    def forward(self, visual_BVC: Tensor) -> Tensor:
        patches_BPC = visual_BVC.to(self.first.weight.dtype)
        if self._side:
            assert self.patches.grid is not None
            grid_BChw = patches_BPC.transpose(1, 2).unflatten(2, self.patches.grid)
            patches_BPC = F.adaptive_avg_pool2d(grid_BChw, self._side).flatten(2).transpose(1, 2)
        return self.last(self.activation(self.first(patches_BPC)))  # type: ignore[no-any-return]
