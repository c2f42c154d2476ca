"""Where a model's weights are: a tag, a file, a folder or a repository of the hub becomes one file on this machine."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from open_clip import download_pretrained, get_pretrained_cfg
from open_clip.pretrained import download_pretrained_from_hf

from megakd.models.weight_kinds import PICKLED_SUFFIXES
from megakd.models.weights import INDEX_SUFFIX, shards
from megakd.recipe import Model
from megakd.runtime.files import sha256

RANDOM = "random"
WEIGHT_SUFFIXES = (".safetensors", *PICKLED_SUFFIXES)
LOCAL, HUB = "local-dir:", "hf-hub:"
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


def weights_file(settings: Model) -> Path:
    """The file of a model's weights, downloaded by open_clip when it is not here yet. Raises ValueError when there is none."""
    name, pretrained = settings.model or "", settings.pretrained or ""
    try:
        if name.startswith(HUB):
            return Path(download_pretrained_from_hf(name.removeprefix(HUB)))
        if tag := _tag(settings):
            return Path(download_pretrained(tag))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"no weights of {name} {pretrained} came ({error}); check the network") from error
    found = local_file(settings)
    if found is None:
        raise ValueError(f"there are no weights for {name} {pretrained}")
    return found


def local_file(settings: Model) -> Path | None:
    """The file of a model's weights as far as it is on this machine: nothing is downloaded. Raises ValueError as `in_folder` does."""
    name, pretrained = settings.model or "", settings.pretrained or ""
    if name.startswith(LOCAL):
        return in_folder(Path(name.removeprefix(LOCAL)))
    if name.startswith(HUB):
        return _cached(name.removeprefix(HUB), None)
    if (tag := _tag(settings)) and tag.get("hf_hub"):
        repository, file = os.path.split(tag["hf_hub"])
        return _cached(repository, file or None)
    return Path(pretrained) if is_file(pretrained) else None


def in_folder(folder: Path) -> Path | None:
    """The weights of a folder with open_clip's configuration: one file, or the index of several; None where there are none.

    Raises ValueError when there are several and nothing says which: open_clip takes the first by name, with a warning.
    """
    if (preferred := next((folder / name for name in _PREFERRED if (folder / name).is_file()), None)) is not None:
        return preferred
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    found = indexes or sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth") and path.is_file())
    if len(found) > 1:
        raise ValueError(
            f"{folder}: holds several files of weights ({', '.join(path.name for path in found)}): name the one that is meant "
            f"{_PREFERRED[0]}"
        )
    return found[0] if found else None


def digest(path: Path) -> str:
    """SHA-256 of a file of weights; of an index, of it and the files that it names."""
    found = hashlib.sha256()
    for file in (path, *shards(path)):
        each = sha256(file)
        if not path.name.endswith(INDEX_SUFFIX):
            return each
        found.update(bytes.fromhex(each))
    return found.hexdigest()


def _tag(settings: Model) -> dict[str, Any] | None:
    """open_clip's description of a pretrained tag; None where the weights are named otherwise."""
    if settings.model is None or ":" in settings.model or settings.pretrained is None:
        return None
    return get_pretrained_cfg(open_clip_name(settings.model), settings.pretrained) or None


def _cached(repository: str, file: str | None) -> Path | None:
    for name in _HUB_FILES if file is None else (f"{Path(file).stem}.safetensors", file):
        if isinstance(found := try_to_load_from_cache(repository, name), str):
            return Path(found)
    return None
