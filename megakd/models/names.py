"""Names of tensors in files -> open_clip's: without the prefixes of wrappers, and from transformers' names of CLIP and SigLIP.

Only names and shapes are used; a tensor that is made of several is put together when it is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.models.weights import Shape, Weights, listed

# Prefixes of every name, from DataParallel, torch.compile, training programs and our own checkpoints.
WRAPPERS = ("module.", "_orig_mod.", "model.", "state_dict.", "student.", "clip.")
# These two also occur inside a name, where a part of the model was wrapped.
INNER = ("module", "_orig_mod")
OLD_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
# What OpenAI's own files have beside the weights.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# Position counters that older versions of transformers saved; open_clip drops the first as well.
DROPPED = re.compile(
    r"text\.transformer\.embeddings\.position_ids|(vision|text)_model\.embeddings\.position_ids|" + "|".join(OPENAI_EXTRAS)
)
OPENAI, TRANSFORMERS = "OpenAI's CLIP", "transformers' CLIP or SigLIP"
TRANSFORMERS_PREFIXES = ("vision_model.", "text_model.")
FOREIGN = {("image_encoder.", "text_encoder."): "Apple's MobileCLIP", TRANSFORMERS_PREFIXES: TRANSFORMERS}
LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
TRUNK = "visual.trunk."  # where open_clip and a teacher of images alone have timm's model
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Part:
    """A tensor under open_clip's name: which tensors of the file it is made of, how, and its shape."""

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


def program(names: Iterable[str]) -> str | None:
    """Whose names a file has: `OPENAI` for OpenAI's own files, a value of FOREIGN, or None for open_clip's and unknown ones."""
    unwrapped = set(_unwrapped(names, {}).values())
    if set(OPENAI_EXTRAS) <= unwrapped:
        return OPENAI
    return next((program for prefixes, program in FOREIGN.items() if any(name.startswith(prefixes) for name in unwrapped)), None)


def as_open_clips(weights: Weights, expected: Mapping[str, Shape]) -> Renamed:
    """`weights` under the names of a model whose state has the names and shapes `expected`; unknown names are kept.

    Raises ValueError when two tensors of the file get one name, or parts of one attention are missing.
    """
    names = _unwrapped(weights.shapes, expected)
    parts = {new: Part((old,), weights.shapes[old]) for old, new in names.items()}
    if any(name.startswith(TRANSFORMERS_PREFIXES) for name in parts):
        parts = _from_transformers(parts, expected, weights.origin)
    if "positional_embedding" in parts and "positional_embedding" not in expected:
        parts = {f"text.{name}" if name.startswith(OLD_TEXT) else name: part for name, part in parts.items()}
    return Renamed(weights, {name: part for name, part in parts.items() if name in expected or not DROPPED.fullmatch(name)})


def as_part(weights: Weights, expected: Mapping[str, Shape], prefix: str, unused: Callable[[str], bool] = lambda name: False) -> Weights:
    """Weights of a part of a model alone, under the names that the part has in it, which begin with `prefix`.

    unused: which of the part's own names are left out where the model has none of them. Weights without one name of the part are
    returned as they are.
    """
    bare = {name.removeprefix(prefix): shape for name, shape in expected.items() if name.startswith(prefix)}
    names = _unwrapped(weights.shapes, bare)
    if not bare.keys() & set(names.values()):
        return weights
    parts = {new: Part((old,), weights.shapes[old]) for old, new in names.items()}
    return Renamed(weights, {f"{prefix}{name}": part for name, part in parts.items() if name in bare or not unused(name)})


def as_trunk(weights: Weights, expected: Mapping[str, Shape], classifiers: tuple[str, ...]) -> Weights:
    """Weights under timm's own names as those of a model that has this trunk; what only training reads is left out.

    classifiers: names of its last layers. Weights without one name of the trunk are returned as they are.
    """
    return as_part(weights, expected, TRUNK, lambda name: only_trains(name, classifiers))


def only_trains(name: str, classifiers: tuple[str, ...]) -> bool:
    """Whether a tensor of timm's, by its own name, is of use in its own training alone. classifiers: names of the model's last layers."""
    return name == "mask_token" or name.rpartition(".")[0] in classifiers


def _unwrapped(shapes: Iterable[str], expected: Mapping[str, Shape]) -> dict[str, str]:
    """The file's names -> the same without what wrappers added."""
    names = {name: name for name in shapes}
    while names and not any(name in expected for name in names.values()):
        prefix = next((prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in names.values())), None)
        if prefix is None or any(name == prefix for name in names.values()):
            break
        names = {old: new.removeprefix(prefix) for old, new in names.items()}
    inner = {old: ".".join(part for part in new.split(".") if part not in INNER) or new for old, new in names.items()}
    names = {old: new if new in expected else inner[old] for old, new in names.items()}
    # Two tensors that would share a name keep theirs, and are refused as unknown.
    counts = Counter(names.values())
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
    """transformers' CLIP and SigLIP under the names of open_clip's models of the same kind, the text tower under its old names."""
    timm = any(name.startswith("visual.trunk.") for name in expected)
    fixed = (SIGLIP_NAMES if timm else CLIP_NAMES) | TEXT_NAMES
    renamed: dict[str, Part] = {}
    attention: dict[tuple[str, str], dict[str, Part]] = {}
    for name, part in parts.items():
        if layer := LAYER.fullmatch(name):
            tower, number, inside = layer.groups()
            module, _, leaf = inside.rpartition(".")
            blocks = "transformer.resblocks" if tower == "text" else "visual.trunk.blocks" if timm else "visual.transformer.resblocks"
            if module.startswith("self_attn.") and (projection := module.removeprefix("self_attn.")) in PROJECTIONS:
                attention.setdefault((f"{blocks}.{number}.attn", leaf), {})[projection] = part
                continue
            table = TIMM_LAYER if timm and tower == "vision" else NATIVE_LAYER
            renamed[f"{blocks}.{number}.{table.get(module, module)}.{leaf}"] = part
        elif name.startswith("vision_model.head.attention.in_proj_") and timm:
            renamed |= _pooling(name.rpartition("_")[2], part)
        else:
            matches = (old for old in fixed if name == old or (old.endswith(".") and name.startswith(old)))
            old = next(matches, "")
            renamed[fixed.get(old, "") + name.removeprefix(old)] = part
    for (module, leaf), projections in attention.items():
        if len(projections) != len(PROJECTIONS):
            needed = ", ".join(PROJECTIONS)
            raise ValueError(f"{origin}: {module} has {leaf} of {listed(projections)} alone, and its attention needs {needed}")
        three = [projections[name] for name in PROJECTIONS]
        shape = (sum(part.shape[0] if part.shape else 0 for part in three), *three[0].shape[1:])
        joined = Part(tuple(part.sources[0] for part in three), shape, torch.cat)
        renamed[f"{module}.qkv.{leaf}" if module.startswith("visual.trunk.") else f"{module}.in_proj_{leaf}"] = joined
    for name in ("visual.proj", "text_projection"):  # a Linear's weight in transformers, a plain matrix in open_clip
        if name in renamed and len(renamed[name].shape) == 2 and not {f"{name}.weight", f"text.{name}.weight"} & expected.keys():
            rows, columns = renamed[name].shape
            renamed[name] = Part(renamed[name].sources, (columns, rows), lambda tensors: tensors[0].T)
    if timm and (position := renamed.get("visual.trunk.pos_embed")) is not None and len(position.shape) == 2:
        renamed["visual.trunk.pos_embed"] = Part(position.sources, (1, *position.shape), lambda tensors: tensors[0][None])
    return renamed


def _pooling(leaf: str, part: Part) -> dict[str, Part]:
    """One matrix for query, key and value in transformers; in timm the query has its own."""
    width, trailing = part.shape[0] // 3 if part.shape else 0, part.shape[1:]
    return {
        f"visual.trunk.attn_pool.q.{leaf}": Part(part.sources, (width, *trailing), lambda tensors: tensors[0][:width]),
        f"visual.trunk.attn_pool.kv.{leaf}": Part(part.sources, (2 * width, *trailing), lambda tensors: tensors[0][width : 3 * width]),
    }
