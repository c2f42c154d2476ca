"""The files of a bundle: written as a whole or not at all, and read only when every one is as it was written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import cached_file

MANIFEST, FORMAT = "bundle.json", 1


def write(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Make `folder` of what `fill` writes into an empty one, and of the manifest: what it returns, and all files' sizes and SHA-256.

    An earlier bundle there is replaced as a whole. Raises ValueError for a folder that holds something else.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds something else than a bundle; choose another folder, or empty this one")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    described = fill(partial)
    _refuse_pieces(partial)
    files = {
        path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    content = {"format": FORMAT, **described, "files": files}
    (partial / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def read(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it.

    Raises ValueError naming the file: no bundle, another format, a file that is missing or changed, or one too many in a part.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: no bundle, it has no {MANIFEST}; a run that trains a decoder writes one to RUN/bundle")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); copy the bundle again, or write it anew by resuming its run") from error
    if version != FORMAT:
        raise ValueError(f"{path}: format {version}, this version of megakd reads format {FORMAT}: use the one that wrote it")
    for name, known in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder}: {name} is missing; a bundle is used whole: copy it again")
        if file.stat().st_size != known["bytes"] or digest(file) != known["sha256"]:
            raise ValueError(f"{folder}: {name} is not what was written (size or SHA-256 differ); copy the bundle again")
    # In a tokenizer's or a model's folder it would be read; beside them anything may lie.
    for part in {name.split("/")[0] for name in files if "/" in name}:
        for file in (folder / part).rglob("*"):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and name not in files:
                raise ValueError(f"{folder}: {name} was not written with it; move it elsewhere")
    return manifest


def _refuse_pieces(folder: Path) -> None:
    """What ZeRO-3 has taken in parts is empty here, and would be written without a word."""
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no dict
                assert 0 not in opened.get_slice(name).get_shape(), f"{path.name}: {name} is empty"


def digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def fingerprint(model: str) -> dict[str, str]:
    """SHA-256 of a language model's configuration and weights, by file name. model: a folder, or a hub name whose files are here.

    Weights of gigabytes are read once for it. Raises ValueError when the model is not on this machine.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            found = cached_file(model, "config.json", local_files_only=True)
        except OSError as error:
            raise ValueError(f"the language model {model!r} is not on this machine: put it where it was, or download it") from error
        assert found is not None
        folder = Path(found).parent
    files = [*folder.glob("config.json"), *folder.glob("*.safetensors")]
    return {path.name: digest(path) for path in sorted(files)}
