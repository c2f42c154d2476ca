"""Outlier channels that change nothing of what a float model computes: what trained giants have and random weights lack.

A few channels of a norm's output become 20 to 60 times as large, and the columns of the layers that read them so much smaller. Where
a block has its norms at its end (EVA02-E), the values of its attention take their place. For measurements of int8 and for tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SHARE = 0.01  # of the channels, at least one
FACTORS = (20.0, 60.0)


def add(model: nn.Module, seed: int = 0, share: float = SHARE) -> int:
    """Put outliers into every transformer block of open_clip's and timm's kinds, in place. Returns how many channels have become some."""
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with torch.no_grad():
        for grown, shrunk in _pairs(model):
            width = len(grown[0])
            channels = torch.randperm(width, generator=generator)[: max(1, round(share * width))]
            factors = torch.ones(width)
            factors[channels] = torch.empty(len(channels)).uniform_(*FACTORS, generator=generator)
            for rows in grown:  # of a norm's weight and bias, or of the rows of a matrix
                rows.copy_(rows * factors.to(rows.device).reshape(-1, *[1] * (rows.ndim - 1)))
            for matrix in shrunk:
                matrix.copy_(matrix / factors.to(matrix.device))
            count += len(channels)
    return count


def _pairs(model: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """(what grows by channel, matrices whose columns shrink by as much)."""
    for module in model.modules():
        block: Any = module
        if hasattr(block, "ln_1") and hasattr(block, "ln_2"):  # open_clip's
            if getattr(block.attn, "in_proj_weight", None) is not None and not hasattr(block, "ln_1_kv"):
                yield _norm(block.ln_1), [block.attn.in_proj_weight]
            yield _norm(block.ln_2), [block.mlp.c_fc.weight]
        elif type(block).__name__ == "EvaBlockPostNorm":
            attention, width = block.attn, block.attn.proj.weight.shape[1]
            values = [attention.qkv.weight[-width:]] if attention.qkv is not None else [attention.v_proj.weight]
            values += [attention.v_bias] if getattr(attention, "v_bias", None) is not None else []
            yield values, [attention.proj.weight]
        elif hasattr(block, "norm1") and hasattr(block, "norm2") and hasattr(block, "attn"):  # timm's ViT and EVA
            attention, mlp = block.attn, block.mlp
            fused = getattr(attention, "qkv", None) is not None
            yield _norm(block.norm1), _matrices(attention, ("qkv",) if fused else ("q_proj", "k_proj", "v_proj"))
            yield _norm(block.norm2), _matrices(mlp, ("fc1", "fc1_g", "fc1_x"))


def _matrices(module: nn.Module, names: tuple[str, ...]) -> list[Tensor]:
    layers: list[Any] = [getattr(module, name, None) for name in names]
    return [layer.weight for layer in layers if layer is not None]


def _norm(norm: Any) -> list[Tensor]:
    return [norm.weight, norm.bias] if getattr(norm, "bias", None) is not None else [norm.weight]
