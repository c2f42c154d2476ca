"""Models and data of a recipe as a page names them, of sections that nobody has checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.pages.texts import clean


def model_name(section: Mapping[str, Any]) -> str:
    """A model as a table names it: open_clip's name with its weights, a store's folder, or an architecture's sizes."""
    model, pretrained, store = (section.get(key) for key in ("model", "pretrained", "store"))
    if isinstance(model, str):
        size = section.get("image_size")
        weights, size = Path(pretrained).name if isinstance(pretrained, str) else "", _pixels(size) if isinstance(size, list) else ""
        return clean(" ".join(filter(None, (model, weights, size))))
    if isinstance(store, str):
        return clean(Path(store).name)
    architecture = section.get("architecture")
    if not isinstance(architecture, Mapping):
        return "?"
    vision = architecture.get("vision_cfg")
    vision = vision if isinstance(vision, Mapping) else {}
    size, patch, width, layers = (vision.get(key, "?") for key in ("image_size", "patch_size", "width", "layers"))
    sizes = f"{size} px, patch {patch}, width {width}, {layers} layers"
    return clean(f"{sizes}, embeddings of {architecture.get('embed_dim', '?')}")


def _pixels(size: list[Any]) -> str:
    return f"at {' x '.join(map(str, dict.fromkeys(size)))} px"


def data_name(train: Any) -> str | None:
    """Patterns of shards as one text."""
    if isinstance(train, str):
        return train
    return ", ".join(map(str, train)) if isinstance(train, list) else None
