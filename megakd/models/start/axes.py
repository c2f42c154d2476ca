"""What each dimension of each tensor of a vision or text transformer counts: the axes along which a smaller tower takes a part of a larger.

A tower's residual width is one axis through all its tensors; heads and MLP channels are an axis of their own in each block; the width of
the joint embedding is one axis of both towers. Two layouts are known, open_clip's own and timm's VisionTransformer.
Legend of the table: w residual width, e joint embedding, h heads (once), q heads (query, key and value), k heads (key and value), m MLP
channels, . a dimension that is taken whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from megakd.models.start.parts import TEXT, VISUAL, Outline, Tower

BLOCK = re.compile(r"^(transformer\.resblocks|trunk\.blocks)\.(\d+)\.")
_IN_BLOCK = {
    r"(ln_[12]|norm[12])\.(weight|bias)|(ls_?[12])\.gamma": "w",
    r"attn\.(in_proj_|qkv\.)weight": "qw",
    r"attn\.(in_proj_|qkv\.)bias": "q",
    r"attn\.(out_proj|proj)\.weight": "wh",
    r"attn\.(out_proj|proj)\.bias": "w",
    r"attn\.[qk]_norm\.(weight|bias)": ".",
    r"mlp\.(c_fc|fc1)\.weight": "mw",
    r"mlp\.(c_fc|fc1)\.bias": "m",
    r"mlp\.(c_proj|fc2)\.weight": "wm",
    r"mlp\.(c_proj|fc2)\.bias": "w",
}
_IMAGE = {
    r"conv1\.weight|trunk\.patch_embed\.proj\.weight": "w...",
    r"class_embedding|trunk\.patch_embed\.proj\.bias": "w",
    r"positional_embedding": ".w",
    r"trunk\.(cls_token|reg_token|pos_embed)": "..w",
    r"(ln_pre|ln_post|trunk\.(norm|norm_pre|fc_norm))\.(weight|bias)": "w",
    r"proj": "we",
    r"trunk\.attn_pool\.latent": "..w",
    r"trunk\.attn_pool\.q\.weight": "hw",
    r"trunk\.attn_pool\.q\.bias": "h",
    r"trunk\.attn_pool\.kv\.weight": "kw",
    r"trunk\.attn_pool\.kv\.bias": "k",
    r"trunk\.attn_pool\.proj\.weight": "wh",
    r"trunk\.attn_pool\.(proj|norm|mlp\.fc2)\.bias|trunk\.attn_pool\.norm\.weight": "w",
    r"trunk\.attn_pool\.mlp\.fc1\.weight": "mw",
    r"trunk\.attn_pool\.mlp\.fc1\.bias": "m",
    r"trunk\.attn_pool\.mlp\.fc2\.weight": "wm",
    r"head\.proj\.weight": "ew",
    r"head\.proj\.bias": "e",
}
_TEXT = {
    r"token_embedding\.weight|positional_embedding": ".w",
    r"cls_emb|ln_final\.(weight|bias)": "w",
    r"text_projection": "we",
    r"text_projection\.weight": "ew",
    r"text_projection\.bias": "e",
}
_TABLES: dict[Tower, dict[str, str]] = {"image": _IMAGE, "text": _TEXT}
_COPIES = {"h": 1, "k": 2, "q": 3}


@dataclass(frozen=True)
class Axis:
    """A dimension that is cut. name: the same wherever the same indices have to be taken. copies: of all heads, one after the other."""

    name: str
    copies: int = 1


@dataclass(frozen=True)
class Place:
    """A tensor of a tower. block: of the tower; None outside of blocks. kind: its name, with the block's number left out."""

    tower: Tower
    block: int | None
    kind: str


def place(name: str, tower: Tower) -> Place:
    bare = name.removeprefix(VISUAL if tower == "image" else TEXT)
    found = BLOCK.match(bare)
    return Place(tower, int(found[2]), f"{found[1]}.*.{bare[found.end() :]}") if found else Place(tower, None, bare)


def axes(where: Place, bare: Collection[Tower]) -> tuple[Axis | None, ...] | None:
    """Of each dimension, None for one that is taken whole; None for a tensor of a layout that is not known.

    bare: towers without a projection, whose residual width is the joint embedding's.
    """
    inside = re.sub(r"^.*\.\*\.", "", where.kind)
    table = _TABLES[where.tower] if where.block is None else _IN_BLOCK
    letters = next((letters for pattern, letters in table.items() if re.fullmatch(pattern, inside)), None)
    if letters is None:
        return None
    block = "pool" if where.block is None else where.block
    names = dict.fromkeys(_COPIES, f"{where.tower} block {block} heads") | {"m": f"{where.tower} block {block} channels", "e": "embedding"}
    names["w"] = "embedding" if where.tower in bare else f"{where.tower} width"
    return tuple(Axis(names[letter], _COPIES.get(letter, 1)) if letter != "." else None for letter in letters)


def blocks_of(outline: Outline, tower: Tower) -> int:
    numbers = [where.block for name in outline.names(tower) if (where := place(name, tower)).block is not None]
    return max((number + 1 for number in numbers if number is not None), default=0)


def head_width(outline: Outline, tower: Tower) -> int | None:
    """Channels of a head, the same in all blocks; None for a tower without attention of these layouts."""
    for name, module in outline.model.named_modules():
        image = name.startswith(VISUAL)
        if image == (tower == "image") and BLOCK.match(f"{name.removeprefix(VISUAL).removeprefix(TEXT)}.") and hasattr(module, "head_dim"):
            return int(module.head_dim)
    return None


def modules_by_kind(outline: Outline, tower: Tower) -> Mapping[str, nn.Module]:
    """A tower's modules by their names, those of blocks by that of the first block."""
    found = dict[str, nn.Module]()
    for name, module in outline.model.named_modules():
        if name and name.startswith(VISUAL) == (tower == "image") and not name.startswith("text_decoder"):
            found.setdefault(place(f"{name}.", tower).kind.removesuffix("."), module)
    return found
