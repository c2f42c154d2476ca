"""References of a bundle: a language model or a vision tower that its run did not change, with the SHA-256 of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from transformers.utils import cached_file

from megakd.export.manifest import MANIFEST, TOWER
from megakd.models import clip
from megakd.models.pretrained import LOCAL, weights_file
from megakd.recipe import Model
from megakd.recipe.section import Section
from megakd.runtime.files import sha256

S = TypeVar("S", bound=Section)


def fingerprint(model: str) -> dict[str, str]:
    """SHA-256 of a language model's configuration and weights, by file name. model: a folder, or a hub name in the local cache.

    Reads all weights. Raises ValueError when the model is not on this machine.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            config = cached_file(model, "config.json", local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"the language model {model!r} is not on this machine: put it where it was, or download it") from error
        assert config is not None
        folder = Path(config).parent
    files = [*folder.glob("config.json"), *folder.glob("*.safetensors")]
    return {path.name: sha256(path) for path in sorted(files)}


def language_reference(model: str) -> dict[str, Any]:
    return {"model": str(Path(model).resolve()) if Path(model).is_dir() else model, "sha256": fingerprint(model)}


def referenced_language(folder: Path, reference: dict[str, Any]) -> str:
    """The language model that a bundle refers to. Raises ValueError when it is not on this machine, or another one than then."""
    model = str(reference["model"])
    try:
        known = fingerprint(model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if known != reference["sha256"]:
        raise ValueError(f"{folder}: its language model {model!r} is another one now (SHA-256 differs): put the one it was trained on back")
    return model


def tower_reference(description: clip.ModelSpec) -> dict[str, Any]:
    settings = description.settings
    file = weights_file(settings, download=False)
    if file is None:
        raise ValueError("the vision tower has no file of weights that a bundle could refer to: save it with the tower inside")
    known = settings.model_dump(mode="json", include=set(Model.model_fields))
    known |= {"model": _resolved(settings.model), "pretrained": _resolved(settings.pretrained), "tokenizer": _resolved(settings.tokenizer)}
    return {"settings": known | {"recipe": None}, "sha256": sha256(file)}


def same_weights(settings: Model, reference: dict[str, Any]) -> bool:
    """Whether the weights of a vision tower are on this machine and those that a bundle refers to."""
    file = weights_file(settings, download=False)
    return file is not None and sha256(file) == reference["sha256"]


def _resolved(name: str | None) -> str | None:
    """A file or folder by its absolute path, as a bundle is read from anywhere; other names unchanged."""
    if name is None:
        return None
    prefix = LOCAL if name.startswith(LOCAL) else ""
    path = Path(name.removeprefix(prefix))
    return f"{prefix}{path.resolve()}" if path.exists() else name


def resolve_tower(folder: Path, known: dict[str, Any]) -> clip.ModelSpec:
    """The vision tower of a bundle, without its weights. Raises ValueError when it is not on this machine, or another one than then."""
    inside = Model(model=f"{LOCAL}{folder / TOWER}")
    settings = inside if known["inside"] else validated(Model, known["settings"], folder, "tower.settings")
    try:
        description = clip.resolve(settings, "tower")
    except ValueError as error:
        raise ValueError(f"{folder}: its vision tower cannot be found; put it where it was, or take a merged bundle: {error}") from error
    if not known["inside"] and not same_weights(settings, known):
        raise ValueError(
            f"{folder}: its vision tower ({settings.model or 'an architecture'}, {settings.pretrained}) is not here, or another one "
            f"(SHA-256 differs): put the one it was trained with back"
        )
    return description


def validated(kind: type[S], values: dict[str, Any], folder: Path, key: str) -> S:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (key, *first["loc"])))
        raise ValueError(f"{folder / MANIFEST}: {where}: {first['msg']}; copy the bundle again") from error
