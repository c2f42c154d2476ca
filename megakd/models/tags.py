"""What open_clip knows of pretrained tags: the activation and the preprocessing that weights were trained with, also of a tag's file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from open_clip import get_model_config, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.pretrained import _clean_tag

from megakd.models.source import is_file, open_clip_name
from megakd.recipe import Model

KEYS = ("mean", "std", "interpolation", "resize_mode")
SUFFIX = "-quickgelu"


def tag_of(settings: Model) -> dict[str, Any] | None:
    """open_clip's description of the tag that `settings` name; None where they name a file, a folder or nothing."""
    if settings.model is None or ":" in settings.model or settings.pretrained is None:
        return None
    return get_pretrained_cfg(open_clip_name(settings.model), settings.pretrained) or None


def told_by_file(settings: Model) -> str | None:
    """The tag whose weights a file holds by its own name, or by the repository whose copy it is; None where that does not tell."""
    if settings.model is None or not is_file(settings.pretrained):
        return None
    path = Path(settings.pretrained or "")
    name = open_clip_name(settings.model)
    known: dict[str, dict[str, Any]] = {
        tag: get_pretrained_cfg(model, tag) for model in (_twin(name), name) for tag in list_pretrained_tags_by_model(model)
    }
    for tag, settings_of_tag in known.items():
        repository = settings_of_tag.get("hf_hub", "").rpartition("/")[0].replace("/", "--")
        if repository and f"models--{repository}" in path.parts:
            return tag
    stem: str = _clean_tag(path.name)
    found = [tag for tag in known if re.search(rf"(?<![a-z0-9]){re.escape(tag)}(?![a-z0-9])", stem)]
    return max(found, key=len) if found else None


def check_activation(settings: Model, config: dict[str, Any], role: str) -> None:
    """Raises ValueError, with the name to use, when a model has GELU and its weights were trained with QuickGELU, or the reverse.

    The weights are a tag, or a file that tells its tag by its name.
    """
    if settings.model is None or ":" in settings.model or settings.pretrained is None:
        return
    name, quick = open_clip_name(settings.model), bool(config.get("quick_gelu"))
    by_file = told_by_file(settings)
    tag = by_file or settings.pretrained
    known = get_pretrained_cfg(name, tag) or get_pretrained_cfg(_twin(name), tag)
    if not known or bool(known.get("quick_gelu")) == quick:
        return
    activation = {True: "QuickGELU", False: "GELU"}
    told = f"{role}.pretrained = {settings.pretrained!r}: {'by its name tag ' + repr(by_file) + ', which' if by_file else 'this tag'}"
    twin = _twin(name)
    if (other := get_model_config(twin)) is not None and bool(other.get("quick_gelu")) != quick:
        remedy = f"set {role}.model = {twin!r}"
    else:
        repository = known.get("hf_hub", "").rpartition("/")[0]
        remedy = f"set {role}.model = 'hf-hub:{repository}' without {role}.pretrained, which brings its own configuration"
    renamed = "; if it holds other weights, rename the file" if by_file else ""
    raise ValueError(
        f"{told} was trained with {activation[not quick]}, and {settings.model!r} has {activation[quick]}, which gives other embeddings: "
        f"{remedy}{renamed}"
    )


def preprocessing_of(settings: Model, role: str) -> tuple[dict[str, Any], str]:
    """Preprocessing of an open_clip model's weights, and where that is known from, for people; {} is open_clip's default.

    Of a file: its tag's where its name tells, else what all tags of the architecture have in common.
    Raises ValueError where they differ, as nothing else says how the file's images were prepared.
    """
    assert settings.model is not None
    if (tag := tag_of(settings)) is not None:
        return _preprocessing(tag), "its tag"
    if not is_file(settings.pretrained):
        return {}, "open_clip's default"
    name = open_clip_name(settings.model)
    if (told := told_by_file(settings)) is not None:
        return _preprocessing(get_pretrained_cfg(name, told) or get_pretrained_cfg(_twin(name), told)), f"tag {told!r}, by the file's name"
    tags = {tag: _preprocessing(get_pretrained_cfg(name, tag)) for tag in list_pretrained_tags_by_model(name)}
    kinds = [found for number, found in enumerate(tags.values()) if found not in list(tags.values())[:number]]
    if len(kinds) > 1:
        differing = {tag: found for tag, found in tags.items() if list(tags.values()).count(found) < len(tags) / 2} or tags
        example = next(iter(differing))
        raise ValueError(
            f"{role}.pretrained = {settings.pretrained!r}: the tags of {settings.model} were trained with different preprocessing "
            f"({', '.join(differing)} with another than the rest), and a file does not say its own: set {role}.preprocess to the tag whose "
            f"it is, such as {example!r}, or to a table {{ mean, std, interpolation, resize_mode }}"
        )
    return (kinds[0], f"all tags of {settings.model}") if kinds else ({}, "open_clip's default")


def preprocessing_by_name(named: str, settings: Model, role: str) -> dict[str, Any]:
    """Preprocessing of the tag that `preprocess = "TAG"` or `"MODEL:TAG"` names. Raises ValueError with the known ones."""
    model, _, tag = named.rpartition(":")
    name = open_clip_name(model or settings.model or "")
    candidates = [name, _twin(name)]
    found = next((known for candidate in candidates if (known := get_pretrained_cfg(candidate, tag))), None)
    if found is None:
        tags = [tag for candidate in candidates for tag in list_pretrained_tags_by_model(candidate)]
        known = f"tags of {name}: {', '.join(dict.fromkeys(tags))}" if tags else "write it as MODEL:TAG, for example ViT-B-16-SigLIP:webli"
        raise ValueError(f"{role}.preprocess = {named!r}: no pretrained tag of open_clip; {known}")
    return _preprocessing(found)


def _preprocessing(tag: dict[str, Any]) -> dict[str, Any]:
    return {key: tag[key] for key in KEYS if key in tag}


def _twin(name: str) -> str:
    return name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else name + SUFFIX
