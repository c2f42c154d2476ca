"""Whether a student can begin with a part of another model: both towers of one layout, computing alike, the student's nowhere larger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg

from megakd.models.start.axes import axes, blocks_of, head_width, modules_by_kind, place
from megakd.models.start.donor import Donor
from megakd.models.start.parts import Outline, Tower
from megakd.models.tokenizing import SAMPLES, tokenizer
from megakd.models.weights import listed

# Keys of open_clip's configurations that say how large a tower is, how its weights were first drawn, or what is dropped in training.
_SIZES = ("layers", "width", "head_width", "heads", "mlp_ratio", "patch_size", "image_size", "context_length")
_OF_TRAINING = ("patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained", "hf_model_pretrained", "ls_init_value")
_OF_WORDS = ("vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")  # seen by the rows and by what the tokenizer does
_SEEN_OTHERWISE = (*_OF_WORDS, "timm_model_name", "pos_embed_type", "output_tokens")
_MAY_DIFFER = {*_SIZES, *_OF_TRAINING, *_SEEN_OTHERWISE}
_IDLE = ("Dropout", "DropPath", "PatchDropout", "PatchDropoutWithIndices", "Identity")
_CFG: dict[Tower, tuple[str, type]] = {"image": ("vision_cfg", CLIPVisionCfg), "text": ("text_cfg", CLIPTextCfg)}


def check(donor: Donor, student: Outline, tower: Tower) -> None:
    """Raises ValueError naming the first differences."""
    if problems := list(_differences(donor, student, tower)):
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"{donor.key}: {donor.origin} has no {tower} tower that the student's can begin with a part of: {shown}")


def _differences(donor: Donor, student: Outline, tower: Tower) -> Iterator[str]:
    theirs, ours = ({place(name, tower).kind for name in outline.names(tower)} for outline in (donor.outline, student))
    if unknown := {name for name in (*donor.outline.names(tower), *student.names(tower)) if axes(place(name, tower), set()) is None}:
        kinds = {place(name, tower).kind for name in unknown}
        yield f"no layout of open_clip's ViT, timm's VisionTransformer or open_clip's text transformer: {listed(kinds, 3)}"
        return
    if missing := ours - theirs:
        yield f"it lacks {listed(missing, 3)}"
    if extra := theirs - ours:
        yield f"it has {listed(extra, 3)}, which the student lacks"
    if missing or extra:
        return
    yield from _in_configuration(donor.description.config, student.description.config, tower)
    yield from _in_layers(donor.outline, student, tower)
    depths = blocks_of(donor.outline, tower), blocks_of(student, tower)
    if depths[1] > depths[0]:
        yield f"it has {depths[0]} layers, the student {depths[1]}: give the student {depths[0]} at most"
    heads = head_width(donor.outline, tower), head_width(student, tower)
    if heads[0] != heads[1]:
        key = "vision_cfg.head_width" if tower == "image" else "text_cfg.heads"
        yield f"its heads have {heads[0]} channels, the student's {heads[1]}, and heads are taken whole: set {key} for the same"
    yield from _in_sizes(donor.outline, student, tower)
    if tower == "text":
        yield from _in_words_known(donor, student)


def _in_configuration(theirs: Mapping[str, Any], ours: Mapping[str, Any], tower: Tower) -> Iterator[str]:
    """What their configurations say that no tensor's shape tells."""
    section, kind = _CFG[tower]
    for field in fields(kind):
        one, other = (config[section].get(field.name, field.default) for config in (theirs, ours))
        if field.name not in _MAY_DIFFER and (one or None) != (other or None):
            yield f"{section}.{field.name} = {one!r} there, {other!r} in the student"


def _in_layers(theirs: Outline, ours: Outline, tower: Tower) -> Iterator[str]:
    """Layers that compute otherwise: the activation, a norm's epsilon, how tokens are pooled."""
    one, other = modules_by_kind(theirs, tower), modules_by_kind(ours, tower)
    for kind in (name for name in one if name in other):
        names = [type(found[kind]).__name__ for found in (one, other)]
        if names[0] != names[1] and not set(names) & set(_IDLE):
            yield f"{kind} is a {names[0]} there, a {names[1]} in the student"
        for key in ("eps", "global_pool", "pool_type", "num_prefix_tokens"):
            values = [getattr(found[kind], key, None) for found in (one, other)]
            if values[0] != values[1]:
                yield f"{kind}.{key} = {values[0]!r} there, {values[1]!r} in the student"


def _in_sizes(theirs: Outline, ours: Outline, tower: Tower) -> Iterator[str]:
    """Axes along which the student is larger, and dimensions that are taken whole and differ."""
    said = set()
    for name in ours.names(tower):
        where = place(name, tower)
        source = next(known for known in theirs.names(tower) if place(known, tower).kind == where.kind)
        for dimension, axis in enumerate(axes(where, set()) or ()):
            have, want = theirs.shapes[source][dimension], ours.shapes[name][dimension]
            if axis is not None and want > have:
                what = axis.name if where.block is None else f"{tower} {axis.name.rpartition(' ')[2]}"
                if what not in said:
                    yield f"{what} {have} there, {want} in the student: give the student {have} at most"
                said.add(what)
            elif axis is None and want != have and not _is_resized(where.kind, have):
                yield f"{where.kind} has {have} rows there, {want} in the student"


def _is_resized(kind: str, rows: int) -> bool:
    """Whether patches of another size, or so many positions, are interpolated: of an image's as those of a square."""
    if kind == "positional_embedding":
        return True
    return kind in ("trunk.pos_embed", "conv1.weight", "trunk.patch_embed.proj.weight")


def _in_words_known(donor: Donor, student: Outline) -> Iterator[str]:
    """Another tokenizer gives other numbers to the same words, and rows of the token embedding would be those of other words."""
    words = student.description.config["text_cfg"]
    if donor.description.config["text_cfg"].get("vocab_size", 49408) != words.get("vocab_size", 49408):
        return  # said with the sizes
    same_length = donor.description.config["text_cfg"] | {"context_length": words.get("context_length", 77)}
    theirs = tokenizer(donor.description.settings.speaks_as, {**donor.description.config, "text_cfg": same_length}, donor.key)
    samples = list(SAMPLES)
    if not torch.equal(theirs(samples), student.description.tokenize(samples)):
        yield "its tokenizer gives other tokens to the same words: set student.tokenizer to it"
