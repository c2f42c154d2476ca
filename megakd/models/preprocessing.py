"""How a model's images are prepared: one answer for the recipe, the built model, the store's key and the export."""

from __future__ import annotations

import functools
import logging
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from megakd.models.architecture import is_number
from megakd.models.pretrained import config_of_tag, is_file, open_clip_name, tag_of, tag_of_file, twins
from megakd.recipe import Model

log = logging.getLogger("megakd.models")

KEYS = ("mean", "std", "interpolation", "resize_mode")
INTERPOLATIONS, RESIZE_MODES = ("bicubic", "bilinear"), ("shortest", "longest", "squash")
DEFAULT = {key: getattr(PreprocessCfg(), key) for key in KEYS}


def chosen(settings: Model, role: str, stored: dict[str, Any] | None) -> dict[str, Any]:
    """What differs from open_clip's defaults. stored: of the folder, the hub or the recipe's architecture; None for an open_clip name.

    `preprocess` in the recipe comes first, then what is stored, the tag's, and what all tags of the architecture have in common.
    Raises ValueError for values that no preprocessing has, and where nothing tells it.
    """
    wanted = settings.preprocess
    if isinstance(wanted, str):
        return _of_named_tag(wanted, settings, role)
    table = {} if wanted is None else wanted.model_dump(exclude_none=True)
    if stored is not None:
        known = stored
        if is_file(settings.pretrained) and not stored and not table:
            assumed(f"{role}: nothing says how the images of {settings.pretrained} were prepared; {_described(DEFAULT)} is assumed")
    elif len(table) == len(KEYS):
        known = {}
    else:
        known, origin = _of_weights(settings, role)
        if is_file(settings.pretrained) and known and _comparable(known) != _comparable(DEFAULT):
            assumed(f"{role}: images are prepared with {_described(known)}, from {origin}")
    _check(known, role)
    return merge_preprocess_dict(known, table)  # type: ignore[no-any-return]


def complete(preprocess: dict[str, Any], config: dict[str, Any]) -> PreprocessCfg:
    """The preprocessing of a model as built: open_clip's defaults, what differs from them, the size the image tower's."""
    settings: dict[str, Any] = merge_preprocess_dict(asdict(PreprocessCfg()), preprocess)
    size = config["vision_cfg"].get("image_size", 224)
    settings["size"] = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return PreprocessCfg(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


def _of_weights(settings: Model, role: str) -> tuple[dict[str, Any], str]:
    """Preprocessing of an open_clip model's weights, and where that is known from, for people; {} is open_clip's default.

    Of a file: its tag's where its name tells, else what all tags of the architecture have in common.
    Raises ValueError where they differ, as nothing else says how the file's images were prepared.
    """
    assert settings.model is not None
    if (config := tag_of(settings)) is not None:
        return _of_tag(config), "its tag"
    if (tag := tag_of_file(settings)) is not None:
        return _of_tag(config_of_tag(settings.model, tag) or {}), f"tag {tag!r}, by the file's name"
    name = open_clip_name(settings.model)
    by_tag = {tag: _of_tag(get_pretrained_cfg(name, tag)) for tag in list_pretrained_tags_by_model(name)}
    if not is_file(settings.pretrained) or not by_tag:
        return {}, "open_clip's default"
    values = list(by_tag.values())
    if any(value != values[0] for value in values):
        differing = {tag: value for tag, value in by_tag.items() if values.count(value) < len(values) / 2} or by_tag
        raise ValueError(
            f"{role}.pretrained = {settings.pretrained!r}: the tags of {settings.model} were trained with different preprocessing "
            f"({', '.join(differing)} with another than the rest), and a file does not say its own: set {role}.preprocess to the tag whose "
            f"it is, such as {next(iter(differing))!r}, or to a table {{ mean, std, interpolation, resize_mode }}"
        )
    return values[0], f"all tags of {settings.model}"


def _of_named_tag(named: str, settings: Model, role: str) -> dict[str, Any]:
    """Preprocessing of the tag that `preprocess = "TAG"` or `"MODEL:TAG"` names. Raises ValueError with the known ones."""
    model, _, tag = named.rpartition(":")
    models = twins(model or settings.model or "")
    if (config := config_of_tag(models[0], tag)) is not None:
        return _of_tag(config)
    tags = [tag for name in models for tag in list_pretrained_tags_by_model(name)]
    known = f"tags of {models[0]}: {', '.join(dict.fromkeys(tags))}" if tags else "write it as MODEL:TAG, for example ViT-B-16-SigLIP:webli"
    raise ValueError(f"{role}.preprocess = {named!r}: no pretrained tag of open_clip; {known}")


def _of_tag(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in KEYS if key in config}


def _check(preprocess: dict[str, Any], role: str) -> None:
    """Raises ValueError for a value that open_clip does not take: the file was written by hand or by another program."""
    for key in ("mean", "std"):
        value = preprocess.get(key)
        if value is None:
            continue
        numbers = value if isinstance(value, (list, tuple)) else ()
        if len(numbers) != 3 or not all(is_number(each) and (key == "mean" or each > 0) for each in numbers):
            raise ValueError(f"{role}: preprocess_cfg.{key} = {value!r}: give three numbers, one a colour{', above 0' * (key == 'std')}")
    for key, known in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZE_MODES)):
        value = preprocess.get(key)
        if value is not None and value not in known:
            raise ValueError(f"{role}: preprocess_cfg.{key} = {value!r}: is one of {', '.join(known)}")


def _comparable(preprocess: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in preprocess.items() if key in KEYS}


def _described(preprocess: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value if isinstance(value, str) else tuple(round(number, 4) for number in value)}"
        for key, value in _comparable(preprocess).items()
    )


@functools.cache
def assumed(text: str) -> None:
    """Say on the main rank, once, what nobody wrote and a run goes by."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.warning("%s", text)
