"""Blocks of open_clip's and timm's transformers under the names of transformers' CLIP and SigLIP encoders, which have the same layers.

What a block has beside them (layer scale, norms of queries and keys, other blocks) is refused: there is no place for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from timm.layers import GELUTanh
from timm.layers import QuickGELU as TimmQuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class NotMapped(ValueError):
    """Why an architecture has no class of transformers: the layer that is other there."""


@dataclass
class Part:
    """One tower for transformers. kind: "clip" or "siglip". state: by the names inside that tower's class; head: its projection there.

    settings: of the tower's configuration. norms: all layer norms met, which share one epsilon in transformers.
    """

    kind: str
    state: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    head: Tensor | None = None
    epsilons: set[float] = field(default_factory=set)
    activations: set[str] = field(default_factory=set)

    def put(self, name: str, module: nn.Module) -> None:
        """A linear or convolutional layer, an embedding, or a layer norm, by its name in transformers."""
        if isinstance(module, nn.LayerNorm):
            self.epsilons.add(float(module.eps))
        for key, value in module.state_dict().items():
            self.state[f"{name}.{key}"] = value

    def finish(self) -> Part:
        """Settings that all layers share. Raises NotMapped where they do not."""
        if len(self.epsilons) > 1:
            raise NotMapped(f"its layer norms have {len(self.epsilons)} epsilons ({', '.join(map(str, sorted(self.epsilons)))}), not one")
        if len(self.activations) > 1:
            raise NotMapped(f"its layers have several activations ({', '.join(sorted(self.activations))}), not one")
        self.settings |= {"layer_norm_eps": self.epsilons.pop(), "hidden_act": self.activations.pop()}
        return self


def put_blocks(part: Part, blocks: Iterable[nn.Module]) -> None:
    """The blocks of a tower as `encoder.layers`, with their settings. Raises NotMapped naming what transformers' layers have not."""
    shapes: set[tuple[int, int, int]] = set()
    number = 0
    for number, block in enumerate(blocks, 1):
        name = f"encoder.layers.{number - 1}"
        if type(block) is ResidualAttentionBlock:
            shapes.add(_of_open_clip(part, name, block))
        elif type(block) is Block:
            shapes.add(_of_timm(part, name, block))
        else:
            raise NotMapped(f"its blocks are {type(block).__name__}s, which have other layers than transformers' CLIP and SigLIP")
    if len(shapes) != 1:
        raise NotMapped(f"its {number} blocks are of {len(shapes)} shapes, not one")
    ((width, heads, inner),) = shapes
    if heads * (width // heads) != width:
        raise NotMapped(f"its width {width} is no multiple of its {heads} heads")
    part.settings |= {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": inner, "num_hidden_layers": number}


def _of_open_clip(part: Part, name: str, block: Any) -> tuple[int, int, int]:
    _nothing_more(block, ("ls_1", "ls_2"))
    put_attention(part, f"{name}.self_attn", block.attn.in_proj_weight, block.attn.in_proj_bias)
    part.put(f"{name}.self_attn.out_proj", block.attn.out_proj)
    part.put(f"{name}.layer_norm1", block.ln_1)
    part.put(f"{name}.layer_norm2", block.ln_2)
    part.put(f"{name}.mlp.fc1", block.mlp.c_fc)
    part.put(f"{name}.mlp.fc2", block.mlp.c_proj)
    part.activations.add(activation(block.mlp.gelu))
    return block.attn.embed_dim, block.attn.num_heads, block.mlp.c_fc.out_features


def _of_timm(part: Part, name: str, block: Any) -> tuple[int, int, int]:
    _nothing_more(block, ("ls1", "ls2"))
    _nothing_more(block.attn, ("q_norm", "k_norm", "norm"))
    _nothing_more(block.mlp, ("norm",))
    if block.attn.qkv.bias is None:
        raise NotMapped("its queries, keys and values have no bias")
    put_attention(part, f"{name}.self_attn", block.attn.qkv.weight, block.attn.qkv.bias)
    part.put(f"{name}.self_attn.out_proj", block.attn.proj)
    part.put(f"{name}.layer_norm1", block.norm1)
    part.put(f"{name}.layer_norm2", block.norm2)
    part.put(f"{name}.mlp.fc1", block.mlp.fc1)
    part.put(f"{name}.mlp.fc2", block.mlp.fc2)
    part.activations.add(activation(block.mlp.act))
    return block.attn.qkv.in_features, block.attn.num_heads, block.mlp.fc1.out_features


def _nothing_more(module: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        inner = getattr(module, name, None)
        if inner is not None and not isinstance(inner, nn.Identity):
            raise NotMapped(f"its {type(module).__name__} has a {type(inner).__name__} ({name}), which transformers' layers have not")


def put_attention(part: Part, name: str, weight: Tensor, bias: Tensor) -> None:
    """Queries, keys and values of one matrix, three in transformers."""
    for key, rows, shift in zip("qkv", weight.detach().chunk(3), bias.detach().chunk(3), strict=True):
        part.state[f"{name}.{key}_proj.weight"] = rows.contiguous()
        part.state[f"{name}.{key}_proj.bias"] = shift.contiguous()


def activation(module: nn.Module) -> str:
    """transformers' name of an activation. Raises NotMapped for one that it has under no name here."""
    if isinstance(module, QuickGELU | TimmQuickGELU):
        return "quick_gelu"
    if isinstance(module, GELUTanh) or (isinstance(module, nn.GELU) and module.approximate == "tanh"):
        return "gelu_pytorch_tanh"
    if isinstance(module, nn.GELU):
        return "gelu"
    raise NotMapped(f"its activation is {type(module).__name__}; known here are GELU, its tanh form, and QuickGELU")
