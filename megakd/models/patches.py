"""What objectives read of a vision tower: the output of one of its blocks, for any tower that open_clip builds, or a block's attention.

Legend: B images, V patches, C the block's width, h x w the grid of patches (V = h * w), H heads, L tokens, class and register tokens
among them.
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
from megakd.models.int8.attention import Int8MultiheadAttention
from megakd.models.transformers_tower import TransformersTower

# For who reads a tower's layers elsewhere: this module is the one that knows open_clip's classes of image towers.
OPEN_CLIP_VIT, OPEN_CLIP_TIMM = VisionTransformer, TimmModel

_STAGES = ("layer1", "layer2", "layer3", "layer4")  # a ResNet's
_WITH_WEIGHTS = ("Attention", "AttentionRope", "EvaAttention")  # of timm's ViT and EVA: one softmax over all tokens


@dataclass(frozen=True)
class Weights:
    """In place of a block's patch tokens the softmax of its attention, which a ViT has, as a number a patch (C = 1).

    How much the class token looks at each patch, or, in a tower without one, all patches in the mean; the mean over heads. What goes to
    class and register tokens is left out, so the numbers of an image add up to less than 1.
    """

    block: int


Read = int | Weights


def feature_name(read: Read) -> str:
    """Its key in `Embeddings.features` of a teacher."""
    return f"attention.{read.block}" if isinstance(read, Weights) else f"patches.{read}"


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
    """Patch tokens of several blocks, or their attention, while the tower runs to its end inside the `with`; with nothing to read nothing
    is kept.

    key: of the recipe, which names the blocks. Raises ValueError as `blocks` does, and for a block without attention that is known here.
    """

    def __init__(self, visual: Any, reads: Collection[Read], key: str = "blocks") -> None:
        self._visual, self._parts = visual, {read: _part(visual, read, key) for read in dict.fromkeys(reads)}
        self.outputs: dict[Read, Tensor] = {}

    def __enter__(self) -> Self:
        self._handles = [part.register_forward_hook(partial(self._keep, read)) for read, part in self._parts.items()]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, read: Read, part: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(read, int):
            self.outputs[read] = output
        else:  # the row is taken later: a block that is recomputed in the backward computes no row, and would be found to differ
            self.outputs[read] = inputs[0] if isinstance(part, nn.Dropout) else output[1]

    def tokens(self, embedded: Any) -> dict[Read, Tensor]:
        """(B, V, C) of each, as `patch_tokens`. embedded: what the tower gave.

        Raises ValueError for a tower that learns and whose blocks are recomputed without a gradient.
        """
        last = embedded[0] if isinstance(embedded, tuple) else embedded
        found = {}
        for read in self._parts:
            output = self.outputs.pop(read)
            block = blocks(self._visual, read if isinstance(read, int) else read.block)
            learns = torch.is_grad_enabled() and (output.requires_grad or any(own.requires_grad for own in block.parameters()))
            if learns and not output.requires_grad:
                raise ValueError(
                    "this vision tower recomputes its blocks without handing out their gradients: set student.activation_checkpointing to "
                    "false, or answers.tower to 'frozen'"
                )
            attached = _WithEnd.apply(output, last) if learns and last.requires_grad else output  # type: ignore[no-untyped-call]
            found[read] = _rows(self._visual, attached) if isinstance(read, int) else _looked_at(self._visual, attached)
        return found

    def maps(self, embedded: Any) -> dict[Read, Tensor]:
        """(B, h, w, C) of each: its tokens on their grid, which `measure` has found to be one. Raises ValueError as `tokens`."""
        grids = {read: _grid(self._visual, read, output) for read, output in self.outputs.items()}
        return {read: tokens_BVC.unflatten(1, grids[read]) for read, tokens_BVC in self.tokens(embedded).items()}  # type: ignore[arg-type]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block: no dropout, and batch norm goes by its running statistics without updating them."""
    training = [part for part in module.modules() if part.training]  # of a tower that is frozen in part, some are not
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def measure(visual: nn.Module, layer: Read, key: str = "decoder.layer") -> Patches:
    """The shape of what `patch_tokens` gives for this tower, or of its attention, measured with a blank image.

    Raises ValueError as `TowerReader` does.
    """
    height, width = image_size(visual)
    device = next(visual.parameters()).device
    with torch.no_grad(), evaluating(visual), TowerReader(visual, [layer], key) as reader:
        embedded = visual(torch.zeros(1, 3, height, width, device=device, dtype=pixel_dtype(visual)))
        output = reader.outputs[layer]
        _, count, channels = reader.tokens(embedded)[layer].shape
    return Patches(count, channels, _grid(visual, layer, output))


def _grid(visual: nn.Module, read: Read, output: Tensor) -> tuple[int, int] | None:
    """(h, w) of what was read; None for a sequence of tokens that are no squares of the image that the tower takes."""
    if isinstance(read, int) and output.ndim == 4:
        h, w = output.shape[1:3] if _channels_last(visual) else output.shape[2:4]
        return h, w
    height, width = image_size(visual)
    count = (_rows(visual, output) if isinstance(read, int) else _looked_at(visual, output)).shape[1]
    h = round(math.sqrt(count * height / width))
    w = count // h if h else 0
    return (h, w) if h * w == count and h * width == w * height else None


def image_size(visual: nn.Module) -> tuple[int, int]:
    """(H, W) that the tower takes."""
    size: Any = visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def blocks(visual: nn.Module, layer: int, key: str = "decoder.layer") -> nn.Module:
    """The block number `layer`, -1 being the last. Raises ValueError, with the recipe's `key`, without blocks or with fewer."""
    every = _read_blocks(visual, f"{key} = {layer}")
    if not -len(every) <= layer < len(every):
        raise ValueError(f"{key} = {layer}: the vision tower has {len(every)} blocks, {-len(every)} to {len(every) - 1}")
    return every[layer]


def number_of(visual: nn.Module, layer: int, key: str) -> int:
    """The block's number from 0, whichever way it was counted. Raises ValueError as `blocks` does."""
    blocks(visual, layer, key)
    return layer % len(_read_blocks(visual, key))


def _read_blocks(visual: nn.Module, named: str) -> list[nn.Module]:
    dropout: Any = visual.patch_dropout if isinstance(visual, VisionTransformer) else None
    if getattr(dropout, "prob", 0.0):
        raise ValueError("vision_cfg.patch_dropout: all patches of an image are read, in their places; set it to 0")
    return every_block(visual, named)


def every_block(visual: nn.Module, named: str) -> list[nn.Module]:
    """A transformer's layers, or a convolutional tower's stages, in order. Raises ValueError, which begins with `named`, without any."""
    if isinstance(visual, VisionTransformer):
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
        f"{named}: a vision tower of class {type(getattr(visual, 'trunk', visual)).__name__} has no blocks that are known here: use an "
        f"open_clip ViT or ResNet, or a timm model with blocks or stages"
    )


def attention_of(visual: Any, weights: Weights, key: str = "blocks") -> nn.Module:
    """The attention of a block, which from now on makes its softmax as a tensor, (B, H, L, L); fused kernels never have it whole.

    It stays so, because a block that is recomputed in the backward has to do what it did in the forward.
    Raises ValueError, with the recipe's `key`, as `blocks` does and for an attention that is not known here.
    """
    attention: Any = getattr(blocks(visual, weights.block, key), "attn", None)
    if isinstance(attention, nn.MultiheadAttention | Int8MultiheadAttention) and isinstance(visual, VisionTransformer):
        if not getattr(attention, "asked_for_weights", False):
            attention.asked_for_weights = True  # type: ignore[assignment]
            attention.register_forward_pre_hook(_with_weights, with_kwargs=True)
        return attention
    trunk = getattr(visual, "trunk", visual)
    if type(trunk).__name__ in ("VisionTransformer", "Eva") and type(attention).__name__ in _WITH_WEIGHTS and visual is not trunk:
        attention.fused_attn = False
        return attention  # type: ignore[no-any-return]
    inside = f" with attention of class {type(attention).__name__}" if attention is not None else ""
    raise ValueError(
        f"{key} = {weights.block}: a vision tower of class {type(trunk).__name__}{inside} has no softmax over its patches that is known "
        f"here; set attention.map to 'activation', which every tower has, or choose a ViT of open_clip or timm, or an EVA of timm"
    )


def _with_weights(attention: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return inputs, {**options, "need_weights": True}


def _part(visual: Any, read: Read, key: str) -> nn.Module:
    """The module in whose forward it is."""
    if isinstance(read, int):
        return blocks(visual, read, key)
    attention: Any = attention_of(visual, read, key)
    return attention if isinstance(visual, VisionTransformer) else attention.attn_drop  # type: ignore[no-any-return]


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


def _looked_at(visual: nn.Module, softmax: Tensor) -> Tensor:
    """(B, V, 1) in float32 of (B, H, L, L), or of the heads' mean (B, L, L), as `Weights` says."""
    trunk: Any = getattr(visual, "trunk", None)
    prefix, has_class = (1, True) if trunk is None else (trunk.num_prefix_tokens, trunk.cls_token is not None)
    if has_class:
        seen = softmax[..., 0, prefix:].float()
    else:
        seen = softmax[..., prefix:, prefix:].mean(-2, dtype=torch.float32)
    return (seen.mean(1) if seen.ndim == 3 else seen)[..., None]


def _channels_last(visual: nn.Module) -> bool:
    """timm's Swin and both SAM have (B, h, w, C), the convolutional towers (B, C, h, w)."""
    if isinstance(visual, TransformersTower):
        return True
    trunk = getattr(visual, "trunk", None)
    return type(trunk).__name__ == "VisionTransformerSAM" or str(getattr(trunk, "output_fmt", "NCHW")).endswith("NHWC")
