"""Int8 replacements of attention modules that read their matrices as tensors instead of calling layers: same inputs, same outputs.

Legend: N batch, L queries, S keys, H heads, C channels of a head, W width (H x C).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.int8.linear import Int8Linear

Make = Callable[[Tensor, nn.Parameter | None], Int8Linear]
# New name in a module's state -> the name of the original's tensor that it is made of, where the two differ.
_FUSED = {"in_proj.weight": "in_proj_weight", "in_proj.scale": "in_proj_weight", "in_proj.bias": "in_proj_bias"}


class Int8MultiheadAttention(nn.Module):
    """Replaces `nn.MultiheadAttention`, without its fused inference path."""

    ORIGINALS: ClassVar[dict[str, str]] = {
        **_FUSED,
        **{f"{letter}_proj.{part}": f"{letter}_proj_weight" for letter in "qkv" for part in ("weight", "scale")},
    }

    q_proj: Int8Linear
    k_proj: Int8Linear
    v_proj: Int8Linear

    def __init__(self, original: nn.MultiheadAttention, make: Make) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.batch_first = original.num_heads, original.dropout, original.batch_first
        if original.in_proj_weight is not None:
            self.in_proj: Int8Linear | None = make(original.in_proj_weight, original.in_proj_bias)
        else:
            # Queries and keys of different widths, as in CoCa's pooler; their bias is still one tensor.
            self.in_proj = None
            self.q_proj, self.k_proj, self.v_proj = (
                make(weight, None) for weight in (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
            )
            self.in_proj_bias: nn.Parameter | None = original.in_proj_bias
        self.out_proj = make(original.out_proj.weight, original.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, where `is_causal` is only a hint beside the mask."""
        assert query.ndim == 3
        assert attn_mask is not None or not is_causal
        same = key is query and value is query
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (_heads(x, self.num_heads) for x in self._projected(query, key, value, same))
        mask, dropout = _mask(attn_mask, key_padding_mask, q), self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits_NHLS = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = F.dropout((logits_NHLS if mask is None else logits_NHLS + mask).softmax(dim=-1), dropout)
            out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
        out_NLW = self.out_proj(out.transpose(1, 2).flatten(2))
        return (out_NLW if self.batch_first else out_NLW.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, ...]:
        if self.in_proj is None:
            q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
            if self.in_proj_bias is None:
                return q, k, v
            return tuple(x + bias.to(x.dtype) for x, bias in zip((q, k, v), self.in_proj_bias.chunk(3), strict=True))
        if same:
            fused: Tensor = self.in_proj(query)
            return fused.chunk(3, dim=-1)
        return tuple(self.in_proj.third(x, third) for third, x in enumerate((query, key, value)))


def rebuilt(module: nn.Module, make: Make) -> nn.Module | None:
    """The int8 replacement of an attention module, with the options that open_clip's models have; None for any other module."""
    if isinstance(module, nn.MultiheadAttention) and module.bias_k is None and module.bias_v is None and not module.add_zero_attn:
        return Int8MultiheadAttention(module, make)
    if isinstance(module, AttentionPool2d):
        return Int8AttentionPool2d(module, make)
    # With `scaled_cosine` the original multiplies four-dimensional tensors by torch.bmm, which refuses them.
    return Int8Attention(module, make) if isinstance(module, Attention) and not module.scaled_cosine else None


def _heads(x_NLW: Tensor, heads: int) -> Tensor:
    """(N, H, L, C)."""
    x_NLHC: Tensor = x_NLW.unflatten(-1, (heads, -1))  # type: ignore[no-untyped-call]
    return x_NLHC.transpose(1, 2)


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q_NHLC: Tensor) -> Tensor | None:
    """Both masks as one to add, (N or 1, H or 1, L or 1, S). True in a boolean mask excludes."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, q_NHLC.shape[:2]) if attn_mask.ndim == 3 else attn_mask[None, None])
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    added = [
        torch.zeros_like(mask, dtype=q_NHLC.dtype).masked_fill_(mask, float("-inf")) if mask.dtype == torch.bool else mask.to(q_NHLC.dtype)
        for mask in masks
    ]
    return functools.reduce(torch.add, added) if added else None


class Int8Attention(nn.Module):
    """Replaces open_clip's `Attention`, which its custom blocks have."""

    ORIGINALS: ClassVar[dict[str, str]] = _FUSED

    def __init__(self, original: Attention, make: Make) -> None:
        super().__init__()
        self.num_heads = original.num_heads
        self.in_proj = make(original.in_proj_weight, original.in_proj_bias)
        self.ln_q, self.ln_k, self.ln_inner = original.ln_q, original.ln_k, original.ln_inner
        self.head_scale = original.head_scale
        self.out_proj = make(original.out_proj.weight, original.out_proj.bias)
        self.attn_drop, self.out_drop = original.attn_drop, original.out_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = (_heads(part, self.num_heads) for part in self.in_proj(x).chunk(3, dim=-1))
        mask = _mask(attn_mask, None, q)
        dropout = self.attn_drop.p if self.training else 0.0
        out_NHLC = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, mask, dropout_p=dropout)
        if self.head_scale is not None:
            out_NHLC = out_NHLC * self.head_scale
        out: Tensor = self.out_drop(self.out_proj(self.ln_inner(out_NHLC.transpose(1, 2).flatten(2))))
        return out


class Int8AttentionPool2d(nn.Module):
    """Replaces the attention pool of open_clip's ResNets, (N, W, height, width) -> (N, O). The mean is the only query."""

    def __init__(self, original: AttentionPool2d, make: Make) -> None:
        super().__init__()
        self.num_heads, self.positional_embedding = original.num_heads, original.positional_embedding
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (
            make(layer.weight, layer.bias) for layer in (original.q_proj, original.k_proj, original.v_proj, original.c_proj)
        )

    def forward(self, x: Tensor) -> Tensor:
        x_NSW = x.flatten(2).transpose(1, 2)
        x_NSW = torch.cat([x_NSW.mean(dim=1, keepdim=True), x_NSW], dim=1)
        x_NSW = x_NSW + self.positional_embedding.to(x.dtype)
        projected = (self.q_proj(x_NSW[:, :1]), self.k_proj(x_NSW), self.v_proj(x_NSW))
        q, k, v = (_heads(part, self.num_heads) for part in projected)
        out_N1W = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.c_proj(out_N1W)[:, 0]
        return out
