"""Texts padded to the longest of their batch (`text_padding = "longest"`) instead of to the tower's context length.

A causal tower that pools where a text ends gives the same embedding however many tokens follow, up to rounding: no position before the end
sees them, and no gradient comes from them. CLIP's captions have 10 to 30 tokens of 77, so most of a text tower's time goes into padding.

1. `refused` says which towers that holds for; `clip.resolve` asks it.
2. `accept` lets such a tower take texts of any length up to its context: open_clip's add all of their positions.
3. `ToLongest` cuts what a tokenizer gives, in the loader's workers, where the end is read without waiting for a device.

Legend: B texts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from open_clip import CLIP
from torch import Tensor, nn

STEP = 8  # lengths are multiples: few shapes for torch.compile and for matrix kernels, which like them as well
Tokenize = Callable[[list[str]], Tensor]


def refused(config: Mapping[str, Any]) -> str | None:
    """Why texts of an open_clip configuration are not to be cut; None where they may be."""
    text: dict[str, Any] = config.get("text_cfg") or {}
    if not text:
        return "it sees images alone"
    if "multimodal_cfg" in config or text.get("embed_cls"):
        return "a CoCa reads a token that stands behind the padding"
    if text.get("hf_model_name"):
        return "a tower of transformers has its own mask and pooling"
    if text.get("no_causal_mask"):
        return "its tower is not causal, and so every token sees the padding"
    if (pool := text.get("pool_type", "argmax")) not in ("argmax", "eos"):
        return f"its pool_type is {pool!r}, which does not pool where a text ends"
    return None


def accept(clip: nn.Module) -> None:
    """Let the text tower of an open_clip model take (B, L) tokens of any L up to its context length. `refused` had nothing against it.

    The class alone changes: names of the state, DeepSpeed's hooks and copies stay what they are, and a whole text gives the same bits.
    """
    tower: Any = clip if isinstance(clip, CLIP) else clip.text
    tower.__class__ = _ShorterClip if isinstance(clip, CLIP) else _shorter(type(tower))


def ends(tokens_BL: Tensor, pool: str, eos: int) -> Tensor:
    """(B,) where open_clip pools: the first of the largest number, or the first end token; 0 where there is none."""
    return (tokens_BL if pool == "argmax" else (tokens_BL == eos).int()).argmax(dim=-1)


@dataclass(frozen=True)
class ToLongest:
    """A tokenizer whose texts end with the longest of them, rounded up to a multiple of `STEP` and at most what `tokenize` gives."""

    tokenize: Tokenize
    pool: str
    eos: int

    @classmethod
    def of(cls, tokenize: Tokenize, config: Mapping[str, Any]) -> ToLongest:
        """For the tower of an open_clip configuration."""
        text = config["text_cfg"]
        return cls(tokenize, text.get("pool_type", "argmax"), text.get("eos_id", 2))

    def __call__(self, texts: list[str]) -> Tensor:
        tokens_BL = self.tokenize(texts)
        if not len(tokens_BL):
            return tokens_BL
        needed = int(ends(tokens_BL, self.pool, self.eos).max()) + 1
        return tokens_BL[:, : -(-needed // STEP) * STEP].contiguous()


class _ShorterClip(CLIP):  # type: ignore[misc]
    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        embedded_BD = _embedded(self, text, self.text_pool_type, self.text_eos_id)
        return nn.functional.normalize(embedded_BD, dim=-1) if normalize else embedded_BD


def _shorter(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of open_clip's `TextTransformer`, which it does not export."""

    class ShorterText(kind):  # type: ignore[valid-type, misc]
        def forward(self, text: Tensor) -> Tensor:
            return _embedded(self, text, self.pool_type, self.eos_id)

    return ShorterText


def _embedded(tower: Any, tokens_BL: Tensor, pool: str, eos: int) -> Tensor:
    """What open_clip's `CLIP.encode_text` and `TextTransformer.forward` compute of causal towers, with as many positions as tokens."""
    length, dtype = tokens_BL.shape[1], tower.transformer.get_cast_dtype()
    x_BLD = tower.token_embedding(tokens_BL).to(dtype) + tower.positional_embedding[:length].to(dtype)
    x_BLD = tower.ln_final(tower.transformer(x_BLD, attn_mask=tower.attn_mask[:length, :length]))
    pooled_BD: Tensor = x_BLD[torch.arange(len(tokens_BL), device=tokens_BL.device), ends(tokens_BL, pool, eos)]
    projection = tower.text_projection
    if isinstance(projection, nn.Linear):
        pooled_BD = projection(pooled_BD)
    elif projection is not None:
        pooled_BD = pooled_BD @ projection
    return pooled_BD
