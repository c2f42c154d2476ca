"""Writing a store of embeddings: one job at a time, part by part, so that a kill costs the parts under way alone.

1. Rank 0 takes the store's lock, compares the manifest that is there with the one it would write, and lists the parts still to do.
2. Every rank writes its parts, each renamed into place when its bytes are on the disk.
3. Rank 0 writes the parts' checksums into the manifest.

Legend: as in `store`.
"""

from __future__ import annotations

import base64
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megakd.data.store.manifest import MANIFEST, Layout, Manifest, StoreError, amount, differences, made_as_wanted, read_manifest
from megakd.data.store.reader import NOTE, PARTS, content_digest, part_path, read_part, row_checks, text_checks
from megakd.runtime.files import atomic_file, clear, sync
from megakd.runtime.locks import LOCK, FolderLock

log = logging.getLogger("megakd.data")

# Small parts keep hundreds of ranks busy and lose little to a kill; 4096 samples with four views of 1024 bf16 numbers are 42 MB.
_LARGEST_PART, _SMALLEST_PART, _PARTS_AT_LEAST = 4096, 64, 256
_MOST_BYTES = 256 << 20  # of a part with patch tokens: a rank holds one in memory, and safetensors copies it to write it


def part_size(samples: int) -> int:
    """Samples a part: a function of the data alone, so that any number of ranks writes the same store."""
    return max(_SMALLEST_PART, min(_LARGEST_PART, -(-samples // _PARTS_AT_LEAST)))


def in_parts(layout: Layout) -> Layout:
    """The same of one part in parts as `part_size` says, with patch tokens smaller ones where they would not fit into memory."""
    part = part_size(layout.samples)
    return replace(layout, part=part if layout.patches is None else max(1, min(part, _MOST_BYTES // layout.sample_bytes)))


def check_room(folder: Path, layout: Layout, numbers: Iterable[int]) -> None:
    """Raises StoreError where the parts of these numbers are larger than what is free on the folder's disk.

    A file system that does not say its size is believed to have room.
    """
    needed, disk = sum(layout.count(number) for number in numbers) * layout.sample_bytes, shutil.disk_usage(folder)
    if disk.total and needed > disk.free:
        patches = "" if layout.patches is None else ", a smaller teacher.patch_grid"
        raise StoreError(
            f"{folder}: {amount(needed)} are to be written and {amount(disk.free)} are free there: make room, choose another "
            f"--out, or fewer --views{patches}"
        )


class StoreLock(FolderLock):
    """Where the file system has no locks two jobs do the same work twice: parts are written whole and are equal."""

    def __init__(self, folder: Path) -> None:
        remedy = "wait for it, end it, or choose another --out (the same command afterwards goes on with what is not done)"
        super().__init__(folder, doing="is writing this store now", remedy=remedy, error=StoreError)


def existing(folder: Path, key: dict[str, Any], made: dict[str, Any], layout: Layout) -> Manifest | None:
    """The manifest in `folder`, when its store may be continued with these settings; None where nothing is there.

    Raises StoreError for a folder with other content and, with every difference, for another store.
    """
    manifest = read_manifest(folder)
    if left := clear(folder, folder / PARTS):
        log.warning("%s: cleared what a killed job had half written: %s", folder, ", ".join(path.name for path in left[:4]))
    if manifest is None:
        # a job that is killed before its first manifest leaves its lock and a folder without parts
        began = {LOCK} | ({PARTS} if (folder / PARTS).is_dir() and not any((folder / PARTS).iterdir()) else set())
        if other := sorted(entry.name for entry in folder.iterdir() if entry.name not in began):
            raise StoreError(f"{folder}: holds {', '.join(other[:4])} and no {MANIFEST}; give --out a new folder or a store")
        return None
    before = made_as_wanted(manifest.made, made)
    mine, theirs = (
        {**one, "made": how, "layout": shape.to_json()}
        for one, how, shape in ((manifest.key, before, manifest.layout), (key, made, layout))
    )
    if lines := differences(mine, theirs):
        raise StoreError(f"{folder}: a store of other embeddings is there:\n  " + "\n  ".join(lines) + "\nchoose another --out")
    return manifest


def start(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a new store, without parts, and return it."""
    (folder / PARTS).mkdir(exist_ok=True)
    _write_manifest(folder, manifest)
    return manifest


def parts_to_do(folder: Path, manifest: Manifest) -> list[int]:
    """Numbers of the parts that are missing or not whole. Removes what a killed job had half written."""
    for partial in (folder / PARTS).glob(".*"):
        partial.unlink(missing_ok=True)
    numbers = []
    for number in range(manifest.layout.parts):
        try:
            read_part(folder, manifest, number)
        except StoreError as error:
            if part_path(folder, number).exists():
                log.warning("%s: it is written anew", error)
            numbers.append(number)
    return numbers


def write_part(
    folder: Path,
    manifest: Manifest,
    number: int,
    image_NVD: Tensor,
    text_ND: Tensor,
    known_N: Tensor,
    patches: Mapping[str, Tensor] = MappingProxyType({}),
    captions_N: Tensor | None = None,
) -> None:
    """Write a part to the disk, values cast to the store's type; known_N: bool. patches: (N, V, h, w, C) by `PatchLayout.tensors`.

    captions_N: of a layout with several captions how many each sample has, whose rows follow one another in text_ND, (T, D) then.

    Raises StoreError when the disk is full or not writable; the parts written before are untouched.
    """
    tensors = {
        "image": image_NVD.to(manifest.layout.torch_dtype).contiguous(),
        "text": text_ND.to(manifest.layout.torch_dtype).contiguous(),
        "known": known_N.to(torch.uint8).contiguous(),
        **{name: values.to(manifest.layout.torch_dtype).contiguous() for name, values in patches.items()},
    }
    if captions_N is not None:
        tensors["captions"] = captions_N.to(torch.int32).contiguous()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == manifest.layout.shapes(number, len(text_ND)), f"part {number}: {shapes}"
    bits = {name: (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy() for name, tensor in tensors.items()}
    blocks = [bits[name] for name in manifest.layout.patch_tensors]
    of_text = bits["text"] if captions_N is None else bits["captions"][:, None]
    checks = base64.b64encode(row_checks(bits["image"], of_text, bits["known"], blocks).tobytes()).decode()
    note = {"store": manifest.digest, "number": number, "known": int(known_N.sum()), "sha256": content_digest(bits), "checks": checks}
    if captions_N is not None:
        note |= {"texts": len(text_ND), "text_checks": base64.b64encode(text_checks(bits["text"]).tobytes()).decode()}
    path = part_path(folder, number)
    try:
        with atomic_file(path) as partial:
            save_file(tensors, partial, {NOTE: json.dumps(note, sort_keys=True)})
            sync(partial)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"could not write {path}: {error}; the parts written before are kept: make room and start the same command again"
        ) from error


def finish(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with its parts' checksums, and return it. Raises StoreError when a part is missing."""
    parts = []
    for number in range(manifest.layout.parts):
        facts = read_part(folder, replace(manifest, parts=()), number)
        name, count = part_path(folder, number).name, manifest.layout.count(number)
        parts.append({"name": name, "first": number * manifest.layout.part, "count": count, "known": facts.known, "sha256": facts.sha256})
    complete = replace(manifest, parts=tuple(parts))
    if complete != manifest:
        _write_manifest(folder, complete)
    return complete


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    try:
        with atomic_file(folder / MANIFEST) as partial:
            partial.write_text(json.dumps(manifest.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
            sync(partial)
        sync(folder)
    except OSError as error:
        raise StoreError(f"could not write {folder / MANIFEST}: {error}; make room and start the same command again") from error
