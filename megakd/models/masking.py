"""Images of which a tower sees a random part, for objectives that teach from the whole image what the student guesses from some of it.

Legend: B images, V patches or squares, K of them that are seen, C a token's width, H x W pixels, p the side of a square.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megakd.models.patches import image_size
from megakd.runtime.precision import BatchNorm

SQUARE = 32  # pixels: the stride of most convolutional towers, and what SimMIM masks of Swin


@dataclass(frozen=True)
class Masked:
    """The share `ratio` of each image's patches is masked, other ones for each image, at random.

    open_clip's ViT loses the tokens of masked patches, after the positions were added and before the first block, as MAE's encoder does
    (arXiv 2111.06377): a forward then costs as little as there is to see. Other towers see the mean colour in place of the patches (SimMIM,
    arXiv 2111.09886): a ViT of timm in squares of its own patch, the others in squares of 32 pixels, or of a quarter of a smaller image.

    The mask is drawn from torch's default generator, which the trainer seeds for each micro-batch by its place: both forwards of exact
    accumulation see the same.
    """

    ratio: float

    @contextlib.contextmanager
    def applied(self, visual: nn.Module, pixels: Tensor) -> Iterator[Tensor]:
        """The pixels to embed inside the `with`, where batch norm's running statistics stay those of whole images.

        Raises ValueError for images of a single patch.
        """
        norms = [part for part in visual.modules() if isinstance(part, BatchNorm) and part.track_running_stats]
        for norm in norms:
            norm.track_running_stats = False
        try:
            tokens = getattr(visual, "patch_dropout", None)  # of open_clip's ViT, also where it drops nothing
            if isinstance(tokens, nn.Module):
                handle = tokens.register_forward_hook(self._without_masked)
                try:
                    yield pixels
                finally:
                    handle.remove()
            else:
                yield self._blank(pixels, _square(visual))
        finally:
            for norm in norms:
                norm.track_running_stats = True

    def seen(self, images: int, patches: int, device: torch.device) -> Tensor:
        """(B, K), the patches of each image that are not masked, in their order. At least one is seen."""
        if patches < 2:
            raise ValueError(
                "objectives.masked_feature: the student's vision tower sees an image as a single patch, of which nothing can be masked; "
                "set its weight to 0, or give the student a smaller patch_size"
            )
        kept = max(1, int(patches * (1 - self.ratio)))
        return torch.rand(images, patches, device=device).argsort(dim=1)[:, :kept].sort(dim=1).values

    def _without_masked(self, module: nn.Module, inputs: Any, tokens_BVC: Tensor) -> Tensor:
        """The class token, and those of the patches that are seen."""
        class_B1C, patches_BVC = tokens_BVC[:, :1], tokens_BVC[:, 1:]
        seen_BK = self.seen(len(patches_BVC), patches_BVC.shape[1], tokens_BVC.device)
        index_BKC = seen_BK[..., None].expand(-1, -1, patches_BVC.shape[2])
        return torch.cat([class_B1C, patches_BVC.gather(1, index_BKC)], dim=1)

    def _blank(self, pixels: Tensor, square: tuple[int, int]) -> Tensor:
        """(B, 3, H, W), 0 in masked squares, which is the mean colour of normalised pixels."""
        height, width = pixels.shape[-2:]
        rows, columns = math.ceil(height / square[0]), math.ceil(width / square[1])
        seen_BK = self.seen(len(pixels), rows * columns, pixels.device)
        masked_BV = pixels.new_ones(len(pixels), rows * columns, dtype=torch.bool).scatter(1, seen_BK, value=False)
        masked_Bhw = masked_BV.reshape(-1, rows, columns)
        masked_BHW = masked_Bhw.repeat_interleave(square[0], 1).repeat_interleave(square[1], 2)[:, :height, :width]
        return pixels.masked_fill(masked_BHW[:, None], 0.0)


def _square(visual: Any) -> tuple[int, int]:
    """(height, width) of what is masked together."""
    trunk = getattr(visual, "trunk", None)
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    if patch is not None and hasattr(trunk, "blocks"):
        return (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))
    height, width = image_size(visual)
    return min(SQUARE, math.ceil(height / 4)), min(SQUARE, math.ceil(width / 4))
