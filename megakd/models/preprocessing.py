"""How a model's images are prepared: one answer for the recipe, the built model, the store's key and the export."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from megakd.models import tags
from megakd.models.source import is_file
from megakd.recipe import Model

log = logging.getLogger("megakd.models")

INTERPOLATIONS, RESIZE_MODES = ("bicubic", "bilinear"), ("shortest", "longest", "squash")
DEFAULT = {key: getattr(PreprocessCfg(), key) for key in tags.KEYS}


def chosen(settings: Model, role: str, stored: dict[str, Any] | None) -> dict[str, Any]:
    """What differs from open_clip's defaults. stored: of the folder, the hub or the recipe's architecture; None for an open_clip name.

    `preprocess` in the recipe comes first, then what is stored, the tag's, and what all tags of the architecture have in common.
    Raises ValueError for values that no preprocessing has, and where nothing tells it.
    """
    asked = settings.preprocess
    if isinstance(asked, str):
        return tags.preprocessing_by_name(asked, settings, role)
    table = {} if asked is None else asked.model_dump(exclude_none=True)
    if stored is not None:
        found = stored
        if is_file(settings.pretrained) and not stored and not table:
            assumed(f"{role}: nothing says how the images of {settings.pretrained} were prepared; {_told(DEFAULT)} is assumed")
    elif len(table) == len(tags.KEYS):
        found = {}
    else:
        found, source = tags.preprocessing_of(settings, role)
        if is_file(settings.pretrained) and found and _same(found) != _same(DEFAULT):
            assumed(f"{role}: images are prepared with {_told(found)}, from {source}")
    _check(found, role)
    return merge_preprocess_dict(found, table)  # type: ignore[no-any-return]


def complete(preprocess: dict[str, Any], config: dict[str, Any]) -> PreprocessCfg:
    """The preprocessing of a model as built: open_clip's defaults, what differs from them, the size the image tower's."""
    found: dict[str, Any] = merge_preprocess_dict(asdict(PreprocessCfg()), preprocess)
    size = config["vision_cfg"].get("image_size", 224)
    found["size"] = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return PreprocessCfg(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})


def _check(preprocess: dict[str, Any], role: str) -> None:
    """Of a file that people or other programs wrote."""
    for key in ("mean", "std"):
        value = preprocess.get(key)
        if value is None:
            continue
        numbers = value if isinstance(value, (list, tuple)) else ()
        fits = len(numbers) == 3 and all(_is_number(number) and (key == "mean" or number > 0) for number in numbers)
        if not fits:
            raise ValueError(f"{role}: preprocess_cfg.{key} = {value!r}: give three numbers, one a colour{', above 0' * (key == 'std')}")
    for key, known in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZE_MODES)):
        value = preprocess.get(key)
        if value is not None and value not in known:
            raise ValueError(f"{role}: preprocess_cfg.{key} = {value!r}: is one of {', '.join(known)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _same(preprocess: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in preprocess.items() if key in tags.KEYS}


def _told(preprocess: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value if isinstance(value, str) else tuple(round(number, 4) for number in value)}"
        for key, value in _same(preprocess).items()
    )


@functools.cache
def assumed(text: str) -> None:
    """Say on the main rank, once, what nobody wrote and a run goes by."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.warning("%s", text)
