"""The files of a bundle: written completely or not at all, and read only when every file is unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from safetensors import safe_open

from megakd.recipe import strict_json
from megakd.runtime.files import atomic_folder, json_sha256, sha256
from megakd.vqa.prompts import RULES

# Format 1 lacks the prompt's rules and the checksum of the manifest itself.
MANIFEST, FORMAT, FORMATS = "bundle.json", 2, (1, 2)
PROJECTOR, ADAPTER, LANGUAGE, TOWER, TOKENIZER = "projector.safetensors", "adapter", "language", "tower", "tokenizer"
_KEYS = {"format", "versions", "decoder", "max_length", "language", "tower", "files"}
_NEWER_KEYS = {"prompt", "sha256"}
_WHERE_OTHERWISE = {"images"}  # how they become RGB, where that is not by default
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 10_000_000  # of a manifest


def write(folder: Path, fill: Callable[[Path], dict[str, Any]], check: Callable[[Path], None]) -> None:
    """Make `folder` of the files that `fill` writes into an empty one, and of the manifest: what it returns, and files' sizes and SHA-256.

    check: gets the finished folder under a temporary name, and raises ValueError to discard it; otherwise it replaces an earlier bundle.
    Raises ValueError for a folder that holds something else.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds something else than a bundle; choose another folder, or empty this one")
    with atomic_folder(folder) as partial:
        entries = fill(partial)
        for path in partial.rglob("*.safetensors"):
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - no dict
                    # as parameters are that ZeRO-3 has partitioned
                    assert 0 not in weights.get_slice(name).get_shape(), f"{path.name}: {name} is empty"
        files = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        content = {"format": FORMAT, **entries, "files": files}
        content["sha256"] = json_sha256(content)
        (partial / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
        check(partial)


def read(folder: Path) -> dict[str, Any]:
    """The manifest, complete and of the right types, after every file was compared with it; `prompt` is added to format 1.

    Raises ValueError naming the file: no bundle, another format, a manifest that was changed, a file that is missing or changed, or an
    unknown one in a part.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: no bundle, it has no {MANIFEST}; a run that trains a decoder writes one to RUN/bundle")
    manifest = _manifest(path)
    files = manifest["files"]
    for name, known in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder}: {name} is missing; a bundle is used whole: copy it again")
        if file.stat().st_size != known["bytes"] or sha256(file) != known["sha256"]:
            raise ValueError(f"{folder}: {name} is not what was written (size or SHA-256 differ); copy the bundle again")
    # An unknown file in a part's folder would be read; beside the parts there may be any.
    for part in (ADAPTER, LANGUAGE, TOWER, TOKENIZER, PROJECTOR):
        path = folder / part
        for file in path.rglob("*") if path.is_dir() else [path]:
            name = file.relative_to(folder).as_posix()
            if file.is_file() and name not in files:
                raise ValueError(f"{folder}: {name} was not written with it; move it elsewhere")
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MOST_BYTES:
        _damaged(path, f"{path.stat().st_size} bytes")
    try:
        manifest = strict_json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (strict_json.NotStrict, UnicodeDecodeError) as error:
        _damaged(path, str(error))
    if not isinstance(manifest, dict) or "format" not in manifest:
        _damaged(path, "it says no format")
    version = manifest["format"]
    if type(version) is not int or version not in FORMATS:
        raise ValueError(
            f"{path}: format {version!r}, this version of megakd reads formats {' and '.join(map(str, FORMATS))}: use the one that wrote it"
        )
    expected = _KEYS | (_NEWER_KEYS if version > 1 else set())
    if wrong := expected ^ (set(manifest) - _WHERE_OTHERWISE):
        _damaged(path, f"{', '.join(sorted(map(str, wrong)))}: missing, or not known")
    if version > 1 and json_sha256({key: value for key, value in manifest.items() if key != "sha256"}) != manifest["sha256"]:
        _damaged(path, "it was changed after it was written (its sha256 differs)")
    manifest.setdefault("prompt", 1)
    _check_values(path, manifest)
    _check_files(path, manifest)
    return manifest


def _check_values(path: Path, manifest: dict[str, Any]) -> None:
    kinds = {"versions": dict, "decoder": dict, "files": dict, "max_length": int, "prompt": int}
    for key, kind in kinds.items():
        if type(manifest[key]) is not kind:
            _damaged(path, f"{key} = {str(manifest[key])[:80]}")
    if manifest["max_length"] < 1 or not 1 <= manifest["prompt"] <= RULES:
        _damaged(path, f"max_length = {manifest['max_length']}, prompt = {manifest['prompt']}")
    images, language, tower = manifest.get("images", {}), manifest["language"], manifest["tower"]
    if not isinstance(images, dict) or not images.keys() <= {"orientation", "transparency"}:
        _damaged(path, f"images = {str(images)[:80]}")
    if language is not None and not (_has(language, model=str, sha256=dict) and _are_digests(language["sha256"].values())):
        _damaged(path, "language is neither null nor a model with the SHA-256 of its files")
    if tower is not None and not (tower == {"inside": True} or _has(tower, inside=bool, settings=dict, sha256=str)):
        _damaged(path, "tower is neither null, inside, nor settings with the SHA-256 of its weights")
    for name, known in manifest["files"].items():
        if not _has(known, bytes=int, sha256=str) or known["bytes"] < 0 or not _are_digests([known["sha256"]]):
            _damaged(path, f"files[{name[:80]!r}] has no size and SHA-256")
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or PurePosixPath(name).as_posix() != name:
            _damaged(path, f"files names {name[:80]!r}, which is no file of a bundle")


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    """Every part that the manifest speaks of is listed, and no other."""
    listed, tower = set(manifest["files"]), manifest["tower"]
    expected = {f"{TOKENIZER}/tokenizer_config.json"}
    if tower is not None:
        expected.add(PROJECTOR)
        if tower["inside"]:
            expected |= {f"{TOWER}/open_clip_config.json", f"{TOWER}/open_clip_model.safetensors"}
    if manifest["decoder"].get("adapt") == "lora":
        expected |= {f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"}
    if manifest["language"] is None:
        expected.add(f"{LANGUAGE}/config.json")
        if not any(name.startswith(f"{LANGUAGE}/") and name.endswith(".safetensors") for name in listed):
            expected.add(f"{LANGUAGE}/model.safetensors")
    if missing := sorted(expected - listed):
        _damaged(path, f"files does not list {', '.join(missing)}")
    parts = {name.split("/")[0] for name in expected}
    if foreign := sorted(name for name in listed if name.split("/")[0] not in parts):
        _damaged(path, f"files lists {foreign[0]}, which is no part of this bundle")


def _has(value: Any, **kinds: type) -> bool:
    return isinstance(value, dict) and set(value) == set(kinds) and all(type(value[key]) is kind for key, kind in kinds.items())


def _are_digests(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) and _SHA256.fullmatch(value) for value in values)


def _damaged(path: Path, why: str) -> NoReturn:
    raise ValueError(f"{path}: damaged ({why}); copy the bundle again, or write it anew by resuming its run")
