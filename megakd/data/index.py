"""The index of one tar: where each sample's members lie, read once with tarfile and kept as a memory-mapped `.npy`.

The rows of ten million samples then cost page cache, shared by all workers, and no memory of each worker's own.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from megakd.data.storage import Stat, file_label, filesystem, is_remote, local_path, mirror, retry
from megakd.runtime.files import atomic_file

Slot = Literal["image", "caption", "json", "cls"]
SLOTS: tuple[Slot, ...] = ("image", "caption", "json", "cls")
IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"})
Rows = NDArray[np.void]

# Row 0 of the file is about the tar itself and not a sample, so that one file, replaced at once, holds all there is to know:
# key = magic, image = (size, stamp), caption = (missing images, missing captions), json = (empty captions, cut or not),
# cls = (checksum of the caption's extension, 0).
_MAGIC = b"megakd-index-1"
_LONGEST_KEY = 64
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
# webdataset's rule: the key is the folder and the base name up to its first dot, the extension is the rest
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]*)$", re.DOTALL)
# What tarfile raises for damaged headers, beside its own errors. OSError is not among them: the network may be at fault.
_DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, struct.error, RecursionError)

log = logging.getLogger("megakd.data")


@dataclass(frozen=True)
class Known:
    """What an index says of its tar before any sample is read."""

    samples: int
    missing_image: int
    missing_caption: int
    empty_caption: int
    truncated: bool


def known(rows: Rows) -> Known:
    head = rows[0]
    counts = (int(head["caption_offset"]), int(head["caption_size"]), int(head["json_offset"]))
    return Known(len(rows) - 1, *counts, truncated=bool(head["json_size"]))


def load(name: str, stat: Stat, caption: str, cache: str | None) -> Rows | None:
    """The stored index, memory-mapped, header row included; None when none is there that fits the tar as it is now."""
    for path in _places(name, caption, cache):
        try:
            rows: Rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError):  # missing, cut short, or no .npy: it is built anew
            continue
        if _fits(rows, stat, caption):
            return rows
    return None


def build(name: str, stat: Stat, caption: str, cache: str | None) -> Rows:
    """Reads the tar from end to end, stores its index in the first place that can be written, and returns it.

    Raises ValueError for a compressed tar and for a file that is no tar.
    """
    rows = retry(lambda: _scan(name, stat, caption, cache), name)
    for path in _places(name, caption, cache):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial, partial.open("wb") as file:
                np.save(file, rows, allow_pickle=False)
        except OSError as error:
            log.debug("index of %s cannot be stored as %s: %s", name, path, error)
            continue
        stored = load(name, stat, caption, cache)
        return rows if stored is None else stored
    log.warning("the index of %s cannot be stored anywhere and is kept in memory: set data.cache to a folder that can be written", name)
    return rows


def _places(name: str, caption: str, cache: str | None) -> list[Path]:
    """Where the index may be, best first: data.cache, beside the tar, the user's cache folder."""
    suffix = f".{re.sub(r'[^A-Za-z0-9_-]', '_', caption)}.index.npy"
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megakd" / "indexes"
    absolute = name if is_remote(name) else os.path.abspath(local_path(name))
    places = [Path(local_path(cache)) / "indexes" / (file_label(absolute) + suffix)] if cache else []
    if not is_remote(name):
        places.append(Path(absolute + suffix))
    return [*places, user / (file_label(absolute) + suffix)]


def _dtype(width: int) -> np.dtype[np.void]:
    fields: list[tuple[str, str]] = [("key", f"S{width}")]
    return np.dtype(fields + [(f"{slot}_{what}", "<u8") for slot in SLOTS for what in ("offset", "size")])


def _fits(rows: Any, stat: Stat, caption: str) -> bool:
    if not isinstance(rows, np.ndarray) or rows.ndim != 1 or len(rows) == 0 or rows.dtype.names is None:
        return False
    if rows.dtype != _dtype(rows.dtype["key"].itemsize if "key" in rows.dtype.names else 1) or rows[0]["key"] != _MAGIC:
        return False
    head = rows[0]
    return (int(head["image_offset"]), int(head["image_size"]), int(head["cls_offset"])) == (
        stat.size,
        stat.stamp,
        zlib.crc32(caption.lower().lstrip(".").encode()),
    )


class _Cut(Exception):
    """The tar ends, or stops making sense, before its end marker."""


def _scan(name: str, stat: Stat, caption: str, cache: str | None) -> Rows:
    with ExitStack() as stack:
        file: IO[bytes]
        if is_remote(name) and cache is None:
            fs, path = filesystem(name)
            file = stack.enter_context(fs.open(path, "rb", block_size=8 << 20, cache_type="readahead"))
        else:
            local = mirror(name, stat, cache) if is_remote(name) and cache else local_path(name)
            file = stack.enter_context(open(local, "rb"))
        samples = _Samples(caption)
        truncated = False
        try:
            for member, offset, size in _members(file, stat.size, name):
                samples.add(member, offset, size)
        except _Cut as cut:
            truncated = True
            samples.drop_cut()
            log.warning("%s is truncated (%s): the %d samples before the cut are used", name, cut, len(samples.rows))
    return samples.table(stat, truncated)


def _members(file: IO[bytes], length: int, name: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each plain file in the tar. Raises _Cut, or ValueError for what is no uncompressed tar."""
    start = file.read(512)
    for magic, command in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"{name} is compressed: samples cannot be read out of order; unpack it with `{command}` and use the .tar")
    file.seek(0)
    if length < 512:
        raise _Cut(f"{length} bytes")
    try:
        # it is the caller's file that has to be closed, and is
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    except tarfile.ReadError as error:
        if not any(start):  # an archive without members is nothing but its end marker
            return
        raise ValueError(f"{name} is no tar file ({error}): was its download cut short or answered with an error page?") from error
    reached = -1
    while (member := _next(tar)) is not None:
        # a negative size in a header would send tarfile backwards for ever (CVE-2025-8194)
        if member.size < 0 or tar.offset <= reached:
            raise _Cut(f"damaged header at byte {member.offset}")
        reached = tar.offset
        vars(tar)["members"] = []  # tarfile would keep every header it has seen
        if member.offset_data + member.size > length:
            raise _Cut(f"{member.name!r} ends at byte {member.offset_data + member.size} of {length}")
        if member.isreg() and not member.issparse():
            yield member.name, member.offset_data, member.size
    file.seek(tar.offset)
    end = file.read(512)
    if len(end) < 512 or any(end):
        raise _Cut(f"no end marker at byte {tar.offset}")


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except _DAMAGE as error:
        raise _Cut(f"{type(error).__name__}: {error}") from error


class _Samples:
    """Members grouped into samples by their key, over the whole tar and in order of first appearance.

    The same name once more (shards appended to each other, say) begins another sample of that key, so that nothing is lost
    and images keep their own captions. A second image of a sample under another extension is ignored: the first one counts.
    """

    def __init__(self, caption: str) -> None:
        self.rows: list[tuple[bytes, dict[Slot, tuple[int, int]]]] = []
        self._caption = caption.lower().lstrip(".")
        self._row_of: dict[str, int] = {}
        self._extensions: list[set[str]] = []
        self._latest = -1

    def add(self, name: str, offset: int, size: int) -> None:
        match = _NAME.match(name)
        slot = self._slot(match.group(2).lower()) if match else None
        if match is None or slot is None:
            return
        key, extension = match.group(1), match.group(2).lower()
        row = self._row_of.get(key)
        if row is None or extension in self._extensions[row]:
            row = self._row_of[key] = len(self.rows)
            # the end of a long key tells more than its beginning; it is a label for people and joins nothing
            self.rows.append((key.encode("utf-8", "surrogateescape")[-_LONGEST_KEY:], {}))
            self._extensions.append(set())
        self._latest = row
        self._extensions[row].add(extension)
        self.rows[row][1].setdefault(slot, (offset, size))

    def _slot(self, extension: str) -> Slot | None:
        if extension == self._caption:
            return "caption"
        if extension in IMAGES:
            return "image"
        return "json" if extension == "json" else "cls" if extension == "cls" else None

    def drop_cut(self) -> None:
        """Forgets the sample that the cut went through: the latest, unless it has all that the one before it has."""
        if self._latest != len(self.rows) - 1 or not self.rows:
            return
        slots = set(self.rows[-1][1])
        expected = set(self.rows[-2][1]) if len(self.rows) > 1 else {"image", "caption"}
        if not expected <= slots:
            self.rows.pop()

    def table(self, stat: Stat, truncated: bool) -> Rows:
        width = max(len(_MAGIC), *(len(key) for key, _ in self.rows), 1)
        table = np.zeros(len(self.rows) + 1, _dtype(width))
        for row, (key, slots) in enumerate(self.rows, start=1):
            table[row]["key"] = key
            for slot, (offset, size) in slots.items():
                table[row][f"{slot}_offset"], table[row][f"{slot}_size"] = offset, size
        samples = table[1:]
        pictured, captioned = samples["image_offset"] > 0, samples["caption_offset"] > 0  # offset 0 is the first header's
        head = table[0]
        head["key"] = _MAGIC
        head["image_offset"], head["image_size"] = stat.size, stat.stamp
        head["caption_offset"] = np.count_nonzero(~pictured)
        head["caption_size"] = np.count_nonzero(pictured & ~captioned)
        head["json_offset"] = np.count_nonzero(pictured & captioned & (samples["caption_size"] == 0))
        head["json_size"], head["cls_offset"] = truncated, zlib.crc32(self._caption.encode())
        return table
