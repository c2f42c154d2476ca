"""Checks an open_clip model configuration before anything is built: keys, types, limits, and what has no effect."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import timm
from open_clip import CLIPTextCfg, CLIPVisionCfg
from open_clip.coca_model import MultimodalCfg
from open_clip.hf_model import _POOLERS

from megakd.recipe import texts

REQUIRED = ("embed_dim", "vision_cfg", "text_cfg")
TOP: dict[str, Any] = {
    "embed_dim": int,
    "vision_cfg": dict,
    "text_cfg": dict,
    "multimodal_cfg": dict,
    "preprocess_cfg": dict,
    "quick_gelu": bool,
    "custom_text": bool,
    "init_logit_scale": float,
    "init_logit_bias": float | None,
    "nonscalar_logit_scale": bool,
}
PARTS = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
# No trained model is larger, and open_clip would build one until memory ends.
MOST = {"layers": 512, "width": 65_536, "embed_dim": 65_536, "image_size": 16_384, "patch_size": 16_384, "context_length": 8192}
MOST |= {"vocab_size": 10_000_000, "heads": 1024, "head_width": 65_536, "mlp_ratio": 64, "attn_pooler_queries": 65_536}
MOST |= {"attn_pooler_heads": 1024, "n_queries": 65_536, "dim_head": 65_536}
MOST_PARAMETERS = 10**12
MOST_PATCHES = 10**6
FRACTIONS = ("patch_dropout", "timm_drop", "timm_drop_path")
CHOICES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("vision_cfg", "pool_type"): ("tok", "avg", "none"),
    ("text_cfg", "pool_type"): ("first", "last", "argmax", "eos"),
    ("vision_cfg", "pos_embed_type"): ("learnable", "sin_cos_2d"),
    ("vision_cfg", "block_type"): (None, "default", "custom"),
    ("text_cfg", "block_type"): (None, "default", "custom"),
    ("text_cfg", "proj_type"): ("linear", "none"),
    ("text_cfg", "tokenizer_mode"): (None, "", "clips"),
    ("text_cfg", "hf_proj_type"): (None, "linear", "mlp"),
    ("text_cfg", "hf_pooler_type"): (None, *_POOLERS),
    ("vision_cfg", "timm_proj"): (None, "", "linear", "mlp", "none"),
}
# null in some of open_clip's own configurations: a ResNet has no patches.
MAY_BE_NONE = ("patch_size", *(key for (_, key), known in CHOICES.items() if None in known))
# The only keys that have an effect beside timm_model_name and hf_model_name, which replace open_clip's own layers.
OF_TIMM = ("timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path", "image_size", "patch_dropout")
OF_HF = (
    *("hf_model_name", "hf_proj_type", "hf_pooler_type", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
    *("context_length", "vocab_size", "output_tokens"),
)


def check(config: Mapping[str, Any], named: str, *, written: bool) -> None:
    """Raises ValueError with every key that is unknown (and the nearest one), of another type, or of a value no model has.

    named: what messages begin with, such as "student.architecture". written: in a recipe, where keys without effect are mistakes too;
    folders' and open_clip's own configurations carry such keys.
    """
    if problems := list(_problems(config, written)):
        more = f"\nand {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError("\n".join(f"{named}.{problem}" for problem in problems[:12]) + more)


def nearest(size: tuple[int, int], step: tuple[int, int]) -> str:
    """For messages: the two sizes of whole steps around `size`, or the one where the smaller would be nothing. step: a patch's sides."""
    below = tuple(side // of * of for side, of in zip(size, step, strict=True))
    above = tuple(-(-side // of) * of for side, of in zip(size, step, strict=True))
    return " and ".join(str(list(found)) for found in (below, above) if min(found) > 0)


def check_whole(size: tuple[int, int], step: tuple[int, int], key: str) -> None:
    """Raises ValueError, with the two nearest sizes, where patches do not cover the image. key: what the message begins with."""
    if any(side % of for side, of in zip(size, step, strict=True)):
        raise ValueError(
            f"{key}: images of {size[0]} x {size[1]} pixels are no whole patches of {step[0]} x {step[1]}; the nearest sizes that are: "
            f"{nearest(size, step)}"
        )


def _problems(config: Mapping[str, Any], written: bool) -> Iterator[str]:
    for key in REQUIRED:
        if key not in config or (config[key] is None and TOP[key] is dict):
            yield f"{key}: missing; an open_clip model configuration has embed_dim, vision_cfg and text_cfg"
    yield from _typed(config, TOP, "")
    of_parts: list[str] = []
    for name, kind in PARTS.items():
        if isinstance(part := config.get(name), dict):
            known = get_type_hints(kind) | ({"attentional_pool": bool | str} if name == "vision_cfg" else {})
            of_parts += [*_typed(part, known, f"{name}."), *_valued(name, part)]
    yield from of_parts
    yield from _limited("", "embed_dim", config.get("embed_dim"))
    scale = config.get("init_logit_scale")
    if isinstance(scale, (int, float)) and abs(scale) > 20:
        yield f"init_logit_scale = {scale}: the logarithm of the scale; between -20 and 20, for example 2.66"
    if not of_parts and all(isinstance(config.get(name), dict) for name in ("vision_cfg", "text_cfg")):
        yield from _fitting(config["vision_cfg"], config["text_cfg"])
        if written:
            yield from _without_effect(config)


def _typed(table: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in table.items():
        if key not in known:
            near = texts.nearest(key, known)
            suggestion = f"did you mean {prefix}{near[0]}? " if near else ""
            yield f"{prefix}{key}: unknown key; {suggestion}known here: {', '.join(known)}"
        elif not (value is None and key in MAY_BE_NONE) and not _is_of(value, known[key]):
            yield f"{prefix}{key} = {texts.shown(value)}: {_type_name(known[key])} is needed"


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is_of(value, option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(get_args(kind)) and all(map(_is_of, value, get_args(kind)))
    if kind in (int, float):
        return is_number(value) and (kind is float or isinstance(value, int))
    return isinstance(value, kind) or (kind is dict and value is None)


def is_number(value: Any) -> bool:
    """Finite, and an integer no larger than a float can be: JSON and Python hold longer ones, which `float` raises OverflowError for."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false, without quotes,", str: "a text", dict: "a table"}
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} whole numbers"
    return names.get(kind, str(kind))


def _limited(prefix: str, key: str, value: Any) -> Iterator[str]:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if any(is_number(number) and not 0 < number <= MOST[key] for number in numbers):
        yield f"{prefix}{key} = {texts.shown(value)}: above 0 and at most {MOST[key]}"


def _valued(name: str, part: Mapping[str, Any]) -> Iterator[str]:
    """Values of one part that no model has."""
    prefix = f"{name}."
    for key, value in part.items():
        if key == "attentional_pool" and isinstance(value, str) and value not in ("parallel", "cascade"):
            yield f"{prefix}{key} = {value!r}: true, false, parallel or cascade"
        elif key in MOST:
            yield from _limited(prefix, key, value)
        elif key in FRACTIONS and isinstance(value, (int, float)) and not 0 <= value < 1:
            yield f"{prefix}{key} = {value}: a fraction, from 0 to below 1"
        elif (name, key) in CHOICES and value not in CHOICES[name, key]:
            known = [option for option in CHOICES[name, key] if option]
            yield f"{prefix}{key} = {value!r}: {texts.did_you_mean(value, known)}one of {', '.join(known)}"
    if (model := part.get("timm_model_name")) and isinstance(model, str) and ":" not in model and not timm.is_model(model):
        near = ", ".join(texts.nearest(model, timm.list_models(), most=3))
        yield f"{prefix}timm_model_name = {model!r}: timm has no such model{f'; nearest: {near}' if near else ''}"


def _fitting(vision: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that are sound alone and not together, defaults included."""
    parameters = 0.0
    if not vision.get("timm_model_name"):
        image = {field.name: vision.get(field.name, field.default) for field in fields(CLIPVisionCfg)}
        size, patch = image["image_size"], image["patch_size"]
        sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
        if isinstance(image["layers"], (list, tuple)):
            if any(side % 32 for side in sides) or sides[0] != sides[1]:
                yield f"vision_cfg.image_size = {size}: a ResNet's images are squares of a multiple of 32 pixels"
            parameters += sum(image["layers"]) * 200 * image["width"] ** 2
        else:
            if patch is None:
                yield "vision_cfg.patch_size: missing; a vision transformer cuts its images into patches"
            elif min(sides) < patch:
                yield f"vision_cfg.patch_size = {patch}: larger than the image, image_size = {size}"
            elif uncovered := max(side % patch for side in sides):
                yield f"vision_cfg.image_size = {size}: no multiple of patch_size = {patch}; {uncovered} pixels would not be seen"
            elif sides[0] * sides[1] / patch**2 > MOST_PATCHES:
                yield f"vision_cfg.patch_size = {patch}: more than {MOST_PATCHES} patches of image_size = {size}"
            if image["width"] % image["head_width"]:
                yield f"vision_cfg.width = {image['width']}: no multiple of head_width = {image['head_width']}"
            parameters += image["layers"] * (4 + 2 * image["mlp_ratio"]) * image["width"] ** 2
    if not text.get("hf_model_name"):
        words = {field.name: text.get(field.name, field.default) for field in fields(CLIPTextCfg)}
        if words["width"] % words["heads"]:
            yield f"text_cfg.width = {words['width']}: no multiple of heads = {words['heads']}"
        parameters += words["layers"] * (4 + 2 * words["mlp_ratio"]) * words["width"] ** 2 + words["vocab_size"] * words["width"]
    if parameters > MOST_PARAMETERS:
        yield f"vision_cfg.width: with its layers the model has {parameters:.1e} parameters; at most {MOST_PARAMETERS:.0e} are built here"


def _without_effect(config: Mapping[str, Any]) -> Iterator[str]:
    """Keys that open_clip reads and does nothing with."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    remedy = "set it to false or take it out; a student takes its library's weights by student"
    if vision.get("timm_model_pretrained"):
        yield f"vision_cfg.timm_model_pretrained = true: loads nothing; {remedy}.image_weights = 'timm'"
    if text.get("hf_model_pretrained"):
        yield f"text_cfg.hf_model_pretrained = true: loads nothing; {remedy}.text_weights = 'transformers'"
    if vision.get("timm_model_name"):
        for key in vision.keys() - {*OF_TIMM, "timm_model_pretrained"}:
            yield f"vision_cfg.{key}: has no effect beside timm_model_name, whose model has its own; take it out"
    else:
        for key in vision:
            if key.startswith("timm_") and key != "timm_model_pretrained" and vision[key]:
                yield f"vision_cfg.{key}: has no effect without timm_model_name"
    if text.get("hf_model_name"):
        for key in text.keys() - {*OF_HF, "hf_model_pretrained", *(["width"] if "multimodal_cfg" in config else [])}:
            yield f"text_cfg.{key}: has no effect beside hf_model_name, whose model has its own; take it out"
    else:
        for key in ("hf_proj_type", "hf_pooler_type"):
            if key in text:
                yield f"text_cfg.{key}: has no effect without hf_model_name"
    if text.get("final_ln_after_pool"):
        yield "text_cfg.final_ln_after_pool = true: open_clip's text tower does not read it; take it out"
    if "multimodal_cfg" not in config:
        for name, part in (("vision_cfg", vision), ("text_cfg", text)):
            if part.get("output_tokens"):
                yield f"{name}.output_tokens = true: is for a CoCa model's decoder (multimodal_cfg); take it out"
        if text.get("embed_cls") and not config.get("custom_text"):
            yield "text_cfg.embed_cls = true: needs custom_text = true beside embed_dim"


def with_text_of(config: Mapping[str, Any], teacher: Mapping[str, Any], key: str) -> dict[str, Any]:
    """open_clip's configuration of a student with the text tower of its teacher's: that text_cfg, embed_dim and activation.

    config, teacher: open_clip's; the student's may lack embed_dim and text_cfg. key: what messages begin with.
    Raises ValueError, naming the keys, where no model has the student's image tower and the teacher's text tower.
    """
    for name, one in (("the teacher", teacher), ("the student", config)):
        if "multimodal_cfg" in one:
            raise ValueError(f"{key}: {name} is a CoCa, whose text tower belongs to its decoder of captions; take text_from out")
    image, width = config.get("vision_cfg") or {}, teacher["embed_dim"]
    own = config.get("embed_dim")
    if image.get("timm_proj") == "none" and own != width:
        raise ValueError(
            f"{key}: the teacher's embeddings have width {width}, and the student's image tower has no projection "
            f"(vision_cfg.timm_proj = 'none'), so that its own are of width {own}: set timm_proj = 'linear'"
        )
    joined = {**config, "text_cfg": _with_effect(teacher["text_cfg"]), "embed_dim": width}
    quick, kinds = (bool(one.get("quick_gelu")) for one in (config, teacher)), {True: "QuickGELU", False: "GELU"}
    ours, theirs = quick
    if not teacher["text_cfg"].get("hf_model_name") and ours != theirs:
        if not image.get("timm_model_name") and not isinstance(image.get("layers"), (list, tuple)):
            name = "the -quickgelu name of its model" if theirs else "the name of its model without -quickgelu"
            raise ValueError(
                f"{key}: the teacher's text tower has {kinds[theirs]}, the student {kinds[ours]}, and open_clip gives both towers "
                f"one activation: set quick_gelu = {str(theirs).lower()} in student.architecture, or take {name}"
            )
        joined["quick_gelu"] = theirs
    if teacher.get("custom_text"):
        joined["custom_text"] = True
    return joined


def _with_effect(text: Mapping[str, Any]) -> dict[str, Any]:
    """A text_cfg of open_clip's own without what `_without_effect` refuses in a recipe."""
    if text.get("hf_model_name"):
        return {key: value for key, value in text.items() if key in OF_HF and key != "output_tokens"}
    idle = ("hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "final_ln_after_pool", "output_tokens")
    return {key: value for key, value in text.items() if key not in idle}
