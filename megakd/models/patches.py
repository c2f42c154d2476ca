"""Patch tokens of a vision tower: the output of one of its blocks, for any tower that open_clip builds.

Legend: B images, V patches, C the block's width, h x w the grid of patches (V = h * w).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from megakd.models.casts import pixel_dtype
from megakd.models.image_only import ImageTower
from megakd.models.transformers_tower import TransformersTower

_STAGES = ("layer1", "layer2", "layer3", "layer4")  # a ResNet's


@dataclass(frozen=True)
class Patches:
    """count: V; width: C; grid: (h, w), or None where it is unknown."""

    count: int
    width: int
    grid: tuple[int, int] | None


def patch_tokens(visual: nn.Module, pixels: Tensor, layer: int) -> Tensor:
    """(B, V, C): the output of block `layer` of open_clip's `clip.visual`, row by row, without class and register tokens.

    pixels: (B, 3, H, W), normalised, of the tower's size. The blocks are a transformer's layers, or a convolutional tower's stages.
    A hook takes the output while the tower's own forward runs to its end: ZeRO-3 gathers parameters in hooks of forwards, which
    open_clip's `forward_intermediates` does not call.
    Raises ValueError for pixels of another size and as `blocks` does.
    """
    height, width = image_size(visual)
    if tuple(pixels.shape[-2:]) != (height, width):
        raise ValueError(
            f"images of {pixels.shape[-2]} x {pixels.shape[-1]} pixels: the vision tower takes {height} x {width}; resize them by its "
            f"own preprocessing"
        )
    with TowerReader(visual, [layer], "decoder.layer") as reader:
        embedded = visual(pixels)
    return reader.tokens(embedded)[layer]


class TowerReader:
    """Patch tokens of several blocks, while the tower runs to its end inside the `with`; without blocks nothing is kept.

    key: of the recipe, which names the blocks. Raises ValueError as `blocks` does.
    """

    def __init__(self, visual: Any, numbers: Collection[int], key: str = "blocks") -> None:
        self._visual, self._read = visual, {number: blocks(visual, number, key) for number in sorted(set(numbers))}
        self.outputs: dict[int, Tensor] = {}

    def __enter__(self) -> Self:
        self._handles = [block.register_forward_hook(partial(self._keep, number)) for number, block in self._read.items()]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, number: int, block: nn.Module, inputs: Any, output: Tensor) -> None:
        self.outputs[number] = output

    def tokens(self, embedded: Any) -> dict[int, Tensor]:
        """(B, V, C) of each block, by its number, as `patch_tokens`. embedded: what the tower gave.

        Raises ValueError for a tower that learns and whose blocks are recomputed without a gradient.
        """
        last = embedded[0] if isinstance(embedded, tuple) else embedded
        found = {}
        for number, block in self._read.items():
            output = self.outputs.pop(number)
            learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in block.parameters())
            if learns and not output.requires_grad:
                raise ValueError(
                    "this vision tower recomputes its blocks without handing out their gradients: set student.activation_checkpointing to "
                    "false, or answers.tower to 'frozen'"
                )
            attached = _WithEnd.apply(output, last) if learns and last.requires_grad else output  # type: ignore[no-untyped-call]
            found[number] = _rows(self._visual, attached)
        return found

    def maps(self, embedded: Any) -> dict[int, Tensor]:
        """(B, h, w, C) of each block: its tokens on their grid, which `measure` has found to be one. Raises ValueError as `tokens`."""
        grids = {number: _grid(self._visual, output) for number, output in self.outputs.items()}
        return {number: tokens_BVC.unflatten(1, grids[number]) for number, tokens_BVC in self.tokens(embedded).items()}  # type: ignore[arg-type]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block: no dropout, and batch norm goes by its running statistics without updating them."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def measure(visual: nn.Module, layer: int, key: str = "decoder.layer") -> Patches:
    """The shape of what `patch_tokens` gives for this tower, measured with a blank image. Raises ValueError as `blocks` does."""
    height, width = image_size(visual)
    device = next(visual.parameters()).device
    with torch.no_grad(), evaluating(visual), TowerReader(visual, [layer], key) as reader:
        embedded = visual(torch.zeros(1, 3, height, width, device=device, dtype=pixel_dtype(visual)))
        output = reader.outputs[layer]
        _, count, channels = reader.tokens(embedded)[layer].shape
    return Patches(count, channels, _grid(visual, output))


def _grid(visual: nn.Module, output: Tensor) -> tuple[int, int] | None:
    """(h, w) of a block's output; None for a sequence of tokens that are no squares of the image that the tower takes."""
    if output.ndim == 4:
        h, w = output.shape[1:3] if _channels_last(visual) else output.shape[2:4]
        return h, w
    height, width = image_size(visual)
    count = _rows(visual, output).shape[1]
    h = round(math.sqrt(count * height / width))
    w = count // h if h else 0
    return (h, w) if h * w == count and h * width == w * height else None


def image_size(visual: nn.Module) -> tuple[int, int]:
    """(H, W) that the tower takes."""
    size: Any = visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def blocks(visual: nn.Module, layer: int, key: str = "decoder.layer") -> nn.Module:
    """The block number `layer`, -1 being the last. Raises ValueError, with the recipe's `key`, without blocks or with fewer."""
    every = _all_blocks(visual)
    if not -len(every) <= layer < len(every):
        raise ValueError(f"{key} = {layer}: the vision tower has {len(every)} blocks, {-len(every)} to {len(every) - 1}")
    return every[layer]


def number_of(visual: nn.Module, layer: int, key: str) -> int:
    """The block's number from 0, whichever way it was counted. Raises ValueError as `blocks` does."""
    blocks(visual, layer, key)
    return layer % len(_all_blocks(visual))


def _all_blocks(visual: nn.Module) -> list[nn.Module]:
    if isinstance(visual, VisionTransformer):
        if getattr(visual.patch_dropout, "prob", 0.0):
            raise ValueError("vision_cfg.patch_dropout: all patches of an image are read, in their places; set it to 0")
        return list(visual.transformer.resblocks)
    if isinstance(visual, ModifiedResNet):
        return [getattr(visual, name) for name in _STAGES]
    if isinstance(visual, TransformersTower):
        return visual.blocks()
    if isinstance(visual, TimmModel | ImageTower):
        trunk: Any = visual.trunk
        for name in ("blocks", "stages", "layers"):
            if isinstance(getattr(trunk, name, None), nn.Sequential | nn.ModuleList):
                return list(getattr(trunk, name))
        if hasattr(trunk, _STAGES[0]):
            return [getattr(trunk, name) for name in _STAGES]
    raise ValueError(
        f"a vision tower of class {type(visual).__name__} has no blocks that are known here: use an open_clip ViT or ResNet, or a timm "
        f"model with blocks or stages"
    )


class _WithEnd(torch.autograd.Function):
    """`output`, with a gradient of zeros for the tower's last output as well, which costs the backward of the blocks after it.

    Without it the tower's own module has no backward: ZeRO-3 then does not gather the parameters that this module itself holds, as a
    ViT's positional embedding, and fails on their empty partitions.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, last: Tensor) -> Tensor:
        ctx.save_for_backward(last)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.zeros_like(ctx.saved_tensors[0])


def _rows(visual: nn.Module, output: Tensor) -> Tensor:
    """(B, V, C) of a block's output, which is a grid or a sequence with prefix tokens."""
    if output.ndim == 4:
        return output.flatten(1, 2) if _channels_last(visual) else output.flatten(2).transpose(1, 2)
    if isinstance(visual, VisionTransformer):
        if not visual.transformer.batch_first:
            output = output.transpose(0, 1)
        return output[:, 1:]
    if isinstance(visual, TransformersTower):
        return output[:, visual.prefix_tokens :]
    trunk: Any = visual.trunk
    return output[:, getattr(trunk, "num_prefix_tokens", 0) :]


def _channels_last(visual: nn.Module) -> bool:
    """timm's Swin and both SAM have (B, h, w, C), the convolutional towers (B, C, h, w)."""
    if isinstance(visual, TransformersTower):
        return True
    trunk = getattr(visual, "trunk", None)
    return type(trunk).__name__ == "VisionTransformerSAM" or str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
