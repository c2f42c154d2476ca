"""Names of tensors in files -> open_clip's: what wrappers put before them, and how transformers names CLIP and SigLIP.

A file of any of these kinds is seen as if open_clip had written it. Only names and shapes are looked at; a tensor is put together when it
is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.models.weights import Shape, Weights, listed

# What DataParallel, torch.compile, trainers and our own checkpoints put before every name.
WRAPPERS = ("module.", "_orig_mod.", "model.", "state_dict.", "student.", "clip.")
# The first two also stand within a name, where a part of the model was wrapped.
INNER = ("module", "_orig_mod")
OLD_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
# OpenAI's own files have them beside the weights.
OPENAI = ("input_resolution", "context_length", "vocab_size")
# Counters that older versions of transformers saved; open_clip drops the first as well.
DROPPED = re.compile(r"text\.transformer\.embeddings\.position_ids|(vision|text)_model\.embeddings\.position_ids|" + "|".join(OPENAI))
FOREIGN = {
    "image_encoder.": "Apple's MobileCLIP",
    "text_encoder.": "Apple's MobileCLIP",
    "vision_model.": "transformers' CLIP or SigLIP",
    "text_model.": "transformers' CLIP or SigLIP",
}
LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Part:
    """A tensor under open_clip's name: of which tensors of the file it is made, how, and its shape."""

    sources: tuple[str, ...]
    shape: Shape
    make: Callable[[list[Tensor]], Tensor] = lambda tensors: tensors[0]


class Renamed:
    """Weights under other names."""

    def __init__(self, weights: Weights, parts: Mapping[str, Part]) -> None:
        self._weights, self._parts, self.origin = weights, parts, weights.origin
        self.shapes: Mapping[str, Shape] = {name: part.shape for name, part in parts.items()}

    def read(self, name: str) -> Tensor:
        part = self._parts[name]
        return part.make([self._weights.read(source) for source in part.sources])


def is_transformers(names: Mapping[str, Shape]) -> bool:
    """Whether transformers' CLIP or SigLIP wrote a file with these names."""
    return any(name.startswith(("vision_model.", "text_model.")) for name in _unwrapped(names, {}).values())


def foreign(names: Mapping[str, Shape]) -> str | None:
    """Whose names a file has, for people, where they are not open_clip's."""
    own = _unwrapped(names, {}).values()
    return next((whose for start, whose in FOREIGN.items() if any(name.startswith(start) for name in own)), None)


def is_openais(names: Mapping[str, Shape]) -> bool:
    """Whether a file has what OpenAI's own files have beside the weights."""
    return set(OPENAI) <= set(_unwrapped(names, {}).values())


def as_open_clips(weights: Weights, expected: Mapping[str, Shape]) -> Renamed:
    """`weights` under the names of a model whose state has the names and shapes `expected`; names that are unknown stay as they are.

    Raises ValueError when two tensors of the file get one name, or parts of one attention are missing.
    """
    names = _unwrapped(weights.shapes, expected)
    parts = {new: Part((old,), weights.shapes[old]) for old, new in names.items()}
    if any(name.startswith(("vision_model.", "text_model.")) for name in parts):
        parts = _from_transformers(parts, expected, weights.origin)
    if "positional_embedding" in parts and "positional_embedding" not in expected:
        parts = {f"text.{name}" if name.startswith(OLD_TEXT) else name: part for name, part in parts.items()}
    return Renamed(weights, {name: part for name, part in parts.items() if name in expected or not DROPPED.fullmatch(name)})


def _unwrapped(shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> dict[str, str]:
    """File's names -> the same without what wrappers added."""
    names = {name: name for name in shapes}
    while names and not any(name in expected for name in names.values()):
        prefix = next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in names.values())), None)
        if prefix is None or any(name == prefix for name in names.values()):
            break
        names = {old: new.removeprefix(prefix) for old, new in names.items()}
    inner = {old: ".".join(part for part in new.split(".") if part not in INNER) or new for old, new in names.items()}
    names = {old: new if new in expected else inner[old] for old, new in names.items()}
    # two tensors that would share a name keep their own, and are refused as unknown ones
    counts: dict[str, int] = {}
    for new in names.values():
        counts[new] = counts.get(new, 0) + 1
    return {old: new if counts[new] == 1 else old for old, new in names.items()}


CLIP_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",  # their spelling
    "vision_model.pre_layernorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
}
SIGLIP_NAMES = {
    "vision_model.embeddings.patch_embedding.": "visual.trunk.patch_embed.proj.",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.post_layernorm.": "visual.trunk.norm.",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.out_proj.": "visual.trunk.attn_pool.proj.",
    "vision_model.head.layernorm.": "visual.trunk.attn_pool.norm.",
    "vision_model.head.mlp.": "visual.trunk.attn_pool.mlp.",
}
TEXT_NAMES = {
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.head.": "text_projection.",
    "text_projection.weight": "text_projection",
}
NATIVE_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
TIMM_LAYER = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "self_attn.out_proj": "attn.proj"}


def _from_transformers(parts: Mapping[str, Part], expected: Mapping[str, Shape], origin: str) -> dict[str, Part]:
    """transformers' CLIP and SigLIP, seen as open_clip's models of the same kind, with the text tower under its old names."""
    timm = any(name.startswith("visual.trunk.") for name in expected)
    fixed = (SIGLIP_NAMES if timm else CLIP_NAMES) | TEXT_NAMES
    found: dict[str, Part] = {}
    attention: dict[tuple[str, str], dict[str, Part]] = {}
    for name, part in parts.items():
        if layer := LAYER.fullmatch(name):
            tower, number, inside = layer.groups()
            module, _, leaf = inside.rpartition(".")
            if module.startswith("self_attn.") and module.removeprefix("self_attn.") in PROJECTIONS:
                key = (_block(tower, number, timm, inside="attn"), leaf)
                attention.setdefault(key, {})[module.removeprefix("self_attn.")] = part
                continue
            table = TIMM_LAYER if timm and tower == "vision" else NATIVE_LAYER
            found[f"{_block(tower, number, timm)}.{table.get(module, module)}.{leaf}"] = part
        elif name.startswith("vision_model.head.attention.in_proj_") and timm:
            found |= _pooling(name.rpartition("_")[2], part)
        else:
            found[_replaced(name, fixed)] = part
    for (block, leaf), three in attention.items():
        if len(three) != len(PROJECTIONS):
            raise ValueError(f"{origin}: {block} has {leaf} of {listed(three)} alone, and its attention needs {', '.join(PROJECTIONS)}")
        found[f"{block}.qkv.{leaf}" if block.startswith("visual.trunk.") else f"{block}.in_proj_{leaf}"] = _joined(three)
    for name in ("visual.proj", "text_projection"):  # a Linear's weight there, a plain matrix here
        if name in found and len(found[name].shape) == 2 and f"{name}.weight" not in expected and f"text.{name}.weight" not in expected:
            rows, columns = found[name].shape
            found[name] = Part(found[name].sources, (columns, rows), lambda tensors: tensors[0].T)
    if timm and (position := found.get("visual.trunk.pos_embed")) is not None and len(position.shape) == 2:
        found["visual.trunk.pos_embed"] = Part(position.sources, (1, *position.shape), lambda tensors: tensors[0][None])
    return found


def _block(tower: str, number: str, timm: bool, inside: str = "") -> str:
    start = "transformer.resblocks" if tower == "text" else "visual.trunk.blocks" if timm else "visual.transformer.resblocks"
    return ".".join(part for part in (start, number, inside) if part)


def _replaced(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return name


def _joined(three: Mapping[str, Part]) -> Part:
    first = [three[name] for name in PROJECTIONS]
    shape = (sum(part.shape[0] if part.shape else 0 for part in first), *first[0].shape[1:])
    return Part(tuple(part.sources[0] for part in first), shape, torch.cat)


def _pooling(leaf: str, part: Part) -> dict[str, Part]:
    """One matrix for query, key and value there; here the query has its own."""
    width = part.shape[0] // 3 if part.shape else 0
    rest = part.shape[1:]
    return {
        f"visual.trunk.attn_pool.q.{leaf}": Part(part.sources, (width, *rest), lambda tensors: tensors[0][:width]),
        f"visual.trunk.attn_pool.kv.{leaf}": Part(part.sources, (2 * width, *rest), lambda tensors: tensors[0][width : 3 * width]),
    }
