"""Where a model's weights are: a tag of open_clip, a file, a folder or a repository of the hub becomes one file on this machine."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, Literal, overload

import timm
from huggingface_hub import try_to_load_from_cache
from open_clip import download_pretrained, get_model_config, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.pretrained import _clean_tag, download_pretrained_from_hf

from megakd.models import transformers_tower
from megakd.models.weight_kinds import PICKLED_SUFFIXES
from megakd.models.weights import INDEX_SUFFIX, shards
from megakd.recipe import Model
from megakd.runtime.files import sha256

RANDOM = "random"
WEIGHT_SUFFIXES = (".safetensors", *PICKLED_SUFFIXES)
LOCAL, HUB, TIMM, OF_TRANSFORMERS = "local-dir:", "hf-hub:", "timm:", "transformers:"
QUICKGELU = "-quickgelu"
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# As open_clip prefers them; a folder with other names has to have one file.
_PREFERRED = (
    *(f"open_clip_{kind}" for kind in ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin", "pytorch_model.pth")),
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)


def is_file(pretrained: str | None) -> bool:
    """Whether `pretrained` names a file, by its suffix."""
    return (pretrained or "").endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))


def is_random(settings: Model) -> bool:
    """Whether no weights are loaded."""
    return settings.pretrained == RANDOM or (settings.pretrained is None and ":" not in (settings.model or ""))


def open_clip_name(name: str) -> str:
    """The name under which open_clip has the configuration, the tags and the tokenizer: it accepts a slash in the first alone."""
    return name if ":" in name else name.replace("/", "-")


def twins(name: str) -> tuple[str, str]:
    """A model's name and that of the same architecture with the other GELU: they share their pretrained tags."""
    name = open_clip_name(name)
    return name, name.removesuffix(QUICKGELU) if name.endswith(QUICKGELU) else name + QUICKGELU


def config_of_tag(name: str, tag: str) -> dict[str, Any] | None:
    """open_clip's description of a tag of a model or of its twin; None for an unknown one."""
    return next((found for twin in twins(name) if (found := get_pretrained_cfg(twin, tag))), None)


def tag_of(settings: Model) -> dict[str, Any] | None:
    """open_clip's description of the tag that `settings` name, of timm's as far as open_clip can fetch it; None where they name a file, a
    folder or nothing.
    """
    if (settings.model or "").startswith(TIMM):
        return _tag_of_timm(settings)
    if settings.model is None or ":" in settings.model or settings.pretrained is None:
        return None
    return get_pretrained_cfg(open_clip_name(settings.model), settings.pretrained) or None


def _tag_of_timm(settings: Model) -> dict[str, Any] | None:
    """None also for a tag whose weights are in no file of timm's own in the hub."""
    name = f"{(settings.model or '').removeprefix(TIMM)}.{settings.pretrained}"
    if settings.pretrained in (None, RANDOM) or name not in timm.list_pretrained(name.partition(".")[0]):
        return None
    tag = timm.get_pretrained_cfg(name)
    assert tag is not None, "listed by timm"
    plain = tag.hf_hub_id and str(tag.custom_load) != "hf" and not tag.hf_hub_filename
    return {"hf_hub": f"{tag.hf_hub_id}/model.safetensors"} if plain else None


def tag_of_file(settings: Model) -> str | None:
    """The tag whose weights a file holds by its own name, or by the repository whose copy it is; None where that does not tell."""
    if settings.model is None or not is_file(settings.pretrained):
        return None
    path = Path(settings.pretrained or "")
    name, twin = twins(settings.model)
    tags: dict[str, dict[str, Any]] = {
        tag: get_pretrained_cfg(model, tag) for model in (twin, name) for tag in list_pretrained_tags_by_model(model)
    }
    for tag, config in tags.items():
        repository = config.get("hf_hub", "").rpartition("/")[0].replace("/", "--")
        if repository and f"models--{repository}" in path.parts:
            return tag
    stem: str = _clean_tag(path.name)
    named = [tag for tag in tags if re.search(rf"(?<![a-z0-9]){re.escape(tag)}(?![a-z0-9])", stem)]
    return max(named, key=len) if named else None


def check_activation(settings: Model, config: dict[str, Any], role: str, *, key: str | None = None) -> None:
    """Raises ValueError, with the name to use, when a model has GELU and its weights were trained with QuickGELU, or the reverse.

    The weights are a tag, or a file that tells its tag by its name. key: of the recipe that names them, default ROLE.pretrained.
    """
    if settings.model is None or ":" in settings.model or settings.pretrained is None:
        return
    quick = bool(config.get("quick_gelu"))
    by_file = tag_of_file(settings)
    trained = config_of_tag(settings.model, by_file or settings.pretrained)
    if trained is None or bool(trained.get("quick_gelu")) == quick:
        return
    activation = {True: "QuickGELU", False: "GELU"}
    told = "by its name tag " + repr(by_file) + ", which" if by_file else "this tag"
    subject = f"{key or f'{role}.pretrained'} = {settings.pretrained!r}: {told}"
    _, twin = twins(settings.model)
    if (other := get_model_config(twin)) is not None and bool(other.get("quick_gelu")) != quick:
        remedy = f"set {role}.model = {twin!r}"
    else:
        repository = trained.get("hf_hub", "").rpartition("/")[0]
        remedy = f"set {role}.model = 'hf-hub:{repository}' without {role}.pretrained, which brings its own configuration"
    renamed = "; if it holds other weights, rename the file" if by_file else ""
    raise ValueError(
        f"{subject} was trained with {activation[not quick]}, and {settings.model!r} has {activation[quick]}, which gives other "
        f"embeddings: {remedy}{renamed}"
    )


@overload
def weights_file(settings: Model, *, download: Literal[True]) -> Path: ...
@overload
def weights_file(settings: Model, *, download: Literal[False]) -> Path | None: ...
def weights_file(settings: Model, *, download: bool) -> Path | None:
    """The file of a model's weights. download: open_clip fetches it when it is not on this machine; otherwise None is returned then.

    None for random weights too. Raises ValueError when there is none to download, when the network fails, and as `in_folder` does.
    """
    name, pretrained, tag = settings.model or "", settings.pretrained or "", tag_of(settings)
    if download and (name.startswith(HUB) or tag):
        try:
            return Path(download_pretrained(tag) if tag else download_pretrained_from_hf(name.removeprefix(HUB)))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"no weights of {name} {pretrained} came ({error}); check the network") from error
    file: Path | None = None
    if is_random(settings):
        pass
    elif name.startswith(LOCAL):
        file = in_folder(Path(name.removeprefix(LOCAL)))
    elif name.startswith(HUB):
        file = _cached(name.removeprefix(HUB), _HUB_FILES)
    elif name.startswith(OF_TRANSFORMERS):
        source = name.removeprefix(OF_TRANSFORMERS)
        if transformers_tower.is_folder(source):
            file = in_folder(Path(source))
        else:
            file = transformers_tower.weights_file(source, download=download)
    elif tag and tag.get("hf_hub"):
        repository, weights = os.path.split(tag["hf_hub"])
        file = _cached(repository, (f"{Path(weights).stem}.safetensors", weights) if weights else _HUB_FILES)
    elif is_file(pretrained):
        file = Path(pretrained)
    elif name.startswith(TIMM) and Path(pretrained).is_dir():
        file = in_folder(Path(pretrained))
    if file is None and download:
        raise ValueError(f"there are no weights for {name} {pretrained}")
    return file


def in_folder(folder: Path) -> Path | None:
    """The weights of a folder with open_clip's configuration: one file, or the index of several; None where there are none.

    Raises ValueError when there are several and nothing says which: open_clip takes the first by name, with a warning.
    """
    if (preferred := next((folder / name for name in _PREFERRED if (folder / name).is_file()), None)) is not None:
        return preferred
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    files = indexes or sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth") and path.is_file())
    if len(files) > 1:
        raise ValueError(
            f"{folder}: holds several files of weights ({', '.join(path.name for path in files)}): name the one that is meant "
            f"{_PREFERRED[0]}"
        )
    return files[0] if files else None


def _cached(repository: str, names: tuple[str, ...]) -> Path | None:
    """The first of these files that is in the hub's cache on this machine."""
    paths = (try_to_load_from_cache(repository, name) for name in names)
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def digest(path: Path) -> str:
    """SHA-256 of a file of weights; of an index, of it and the files that it names."""
    if not path.name.endswith(INDEX_SUFFIX):
        return sha256(path)
    return hashlib.sha256(b"".join(bytes.fromhex(sha256(file)) for file in (path, *shards(path)))).hexdigest()
