"""The index of one tar: where each sample's members lie, read once and kept as a `.npy` that all workers map into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megakd.data import tar_members
from megakd.data.samples import SLOTS, Losses, SampleBuilder, TarSample, slots_of
from megakd.data.storage import INDEX, Stat, file_label, filesystem, is_remote, local_path, mirror, retry, shown
from megakd.runtime.files import atomic_file, users_cache

IndexRows = NDArray[np.void]
Further = tuple[str, ...]  # extensions of members beside those of `samples.SLOTS` and the captions'

# Row 0 of the file is about the tar: key = magic, image = (size of the tar, checksum of the captions' extensions, checksum of this file),
# caption = (stamp of the tar, report's bytes, 0), json = (rows of the report, digest of the content, 0). The report's rows follow: JSON,
# `Known` without the counts that rows tell.
_MAGIC = b"megakd-index-2"
_LONGEST_KEY = 64
_NPY_1_0, _START = b"\x93NUMPY\x01\x00", struct.Struct("<8sH")  # what a .npy begins with, and the length of its header
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
SPARSE = 1 << 63  # flag of an offset: the member is sparse, and its bytes are those of its headers and packed data
HEADER = tar_members.BLOCK  # before a member's data; `check` is its checksum, and it is read along with the data
_DIGESTED = 4096  # bytes of each image, member of captions and further member that enter the digest of the content

log = logging.getLogger("megakd.data")


@dataclass(frozen=True)
class Known:
    """What an index tells of its tar before a sample is read; counts come with an example's key.

    expected: samples by the shard's `_stats.json`, None without one. digest: a checksum of keys, sizes and the content's beginnings.
    lacking: where captions are in several members, the samples with an image that have some of them and lack this one, by its extension.
    """

    samples: int
    missing_image: tuple[int, str]
    missing_caption: tuple[int, str]
    empty_caption: tuple[int, str]
    losses: Losses
    expected: int | None
    digest: int
    lacking: dict[str, tuple[int, str]]

    @classmethod
    def of_report(cls, report: dict[str, Any], samples: int, digest: int) -> Known:
        """Of the JSON that `report` gives. Raises what damaged JSON makes Python raise: ValueError, KeyError, TypeError, AttributeError."""
        missing = {name: (int(count), str(key)) for name, (count, key) in report["missing"].items()}
        losses = Losses(**report["losses"])
        for counts in (losses.dropped, losses.unused):
            counts |= {name: (int(count), str(example)) for name, (count, example) in counts.items()}
        lacking = {name: (int(count), str(key)) for name, (count, key) in report.get("lacking", {}).items()}
        return cls(samples, **missing, losses=losses, expected=report["expected"], digest=digest, lacking=lacking)

    def report(self) -> dict[str, Any]:
        """As JSON, without what rows tell: the number of samples and the digest."""
        missing = {name: getattr(self, name) for name in ("missing_image", "missing_caption", "empty_caption")}
        losses = {field.name: getattr(self.losses, field.name) for field in dataclasses.fields(Losses)}
        return {"missing": missing, "lacking": self.lacking, "losses": losses, "expected": self.expected}

    def lost(self, elsewhere: int | None, alike: bool) -> int:
        """Samples that damage took, as far as can be told. elsewhere: mean samples of a sound shard of the set; alike: all hold as many."""
        dropped = sum(count for count, _ in self.losses.dropped.values())
        if self.expected is not None:
            return max(0, self.expected - self.samples - dropped)
        losses = self.losses
        if elsewhere is not None and (losses.open_end or (losses.lost > losses.certain and alike)):
            return max(losses.certain if alike or not losses.open_end else losses.lost, elsewhere - self.samples - dropped)
        return self.losses.lost


def known(rows: IndexRows) -> Known:
    head = rows[0]
    report = json.loads(np.ascontiguousarray(rows[1 : 1 + int(head["json_offset"])]).tobytes()[: int(head["caption_size"])])
    return Known.of_report(report, len(samples(rows)), int(head["json_size"]))


def with_stats_of_today(told: Known, name: str) -> Known:
    """Without the count of a `_stats.json` by which samples would be lost and which was removed since, as its message advises."""
    if told.expected is None or is_remote(name) or told.expected <= told.samples or os.path.exists(local_path(_stats_of(name))):
        return told
    return dataclasses.replace(told, expected=None)


def samples(rows: IndexRows) -> IndexRows:
    """The rows of samples."""
    return rows[1 + int(rows[0]["json_offset"]) :]


def load(name: str, stat: Stat, captions: tuple[str, ...], cache: str | None, further: Further = ()) -> IndexRows | None:
    """The stored index, memory-mapped, header rows included; None where none fits the tar as it is now."""
    return next(_stored(name, stat, captions, cache, further, say=False), None)


def load_checked(name: str, stat: Stat, captions: tuple[str, ...], cache: str | None, further: Further = ()) -> IndexRows | None:
    """As `load`, with its checksum compared: a damaged index is logged and not used."""
    for rows in _stored(name, stat, captions, cache, further, say=True):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if int(rows[0]["image_check"]) == _checksum(rows):
                known(rows)
                return rows
        log.warning("the index of %s is damaged and is built anew", shown(name))
    return None


def _stored(name: str, stat: Stat, captions: tuple[str, ...], cache: str | None, further: Further, *, say: bool) -> Iterator[IndexRows]:
    for path in map(Path, _places(name, captions, cache, further)):
        try:
            rows = _mapped(path)
        except FileNotFoundError:
            continue
        except Exception:  # cut short, or no .npy, whose header np.load reads as Python
            if say and path.is_file():
                log.warning("the index of %s is damaged and is built anew", shown(name))
            continue
        if _fits(rows, stat, captions, further):
            yield rows


def _mapped(path: Path) -> IndexRows:
    """As `np.load`, which parses each header anew: a run opens one index after the other, and most have equal headers."""
    with path.open("rb") as file:
        start = file.read(_START.size)
        magic, length = _START.unpack(start) if len(start) == _START.size else (b"", 0)
        if magic != _NPY_1_0:  # a later version, where a member's name is not Latin; or no .npy
            return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
        shape, dtype = _header(file.read(length))
        return np.memmap(file, dtype, "r", _START.size + length, shape)


@functools.lru_cache(maxsize=1024)
def _header(text: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    shape, _, dtype = np.lib.format.read_array_header_1_0(BytesIO(len(text).to_bytes(2, "little") + text))
    if dtype.hasobject:
        raise ValueError("an array of objects, which are pickles")
    return shape, dtype


def is_stored(name: str, captions: tuple[str, ...], cache: str | None, further: Further) -> bool:
    """Whether there is an index, of whatever tar of that name."""
    return any(map(os.path.isfile, _places(name, captions, cache, further)))


def load_or_build(
    name: str, stat: Stat, captions: tuple[str, ...], cache: str | None, further: Further, *, checked: bool = False
) -> IndexRows:
    """The stored index, or a new one. checked: its checksum is compared. Raises as `build`."""
    rows = (load_checked if checked else load)(name, stat, captions, cache, further)
    return build(name, stat, captions, cache, further) if rows is None else rows


def build(
    name: str,
    stat: Stat,
    captions: tuple[str, ...],
    cache: str | None,
    further: Further = (),
    done: Callable[[int], None] = lambda _: None,
) -> IndexRows:
    """Reads the tar from end to end, stores its index in the first place that can be written, and returns it.

    done: is told how many more of its bytes were passed, all of them in the end.

    Raises ValueError for a compressed tar, for a file that is no tar, and for one that may not be read.
    """
    try:
        counted = _Passed(stat.size, done)
        rows = retry(lambda: _scan(name, stat, captions, cache, counted, further), name)
        counted.to(stat.size)
    except PermissionError as error:
        raise ValueError(f"{shown(name)} may not be read ({error.strerror}): change its permissions, or who starts the run") from error
    for path in map(Path, _places(name, captions, cache, further)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial, partial.open("wb") as file:
                np.save(file, rows, allow_pickle=False)
        except OSError as error:
            log.debug("index of %s cannot be stored as %s: %s", shown(name), path, error)
            continue
        stored = load(name, stat, captions, cache, further)
        return rows if stored is None else stored
    log.warning(
        "the index of %s cannot be stored anywhere and is kept in memory: set data.cache to a folder that can be written", shown(name)
    )
    return rows


def _places(name: str, captions: tuple[str, ...], cache: str | None, further: Further) -> list[str]:
    suffix = f".{re.sub(r'[^A-Za-z0-9_-]', '_', '_'.join((*captions, *further)))}{INDEX}"
    absolute = name if is_remote(name) else os.path.abspath(local_path(name))
    return places(file_label(absolute) + suffix, None if is_remote(name) else absolute + suffix, cache)


def places(label: str, beside: str | None, cache: str | None) -> list[str]:
    """Where an index may be, best first: in data.cache as `label`, at the path `beside`, in the user's cache folder as `label`."""
    own, home = [os.path.join(local_path(cache), "indexes", label)] if cache else [], users_cache()
    users = [] if home is None else [os.path.join(home, "megakd", "indexes", label)]
    return [*own, *([] if beside is None else [beside]), *users]


@functools.cache
def _dtype(width: int, captions: tuple[str, ...], further: Further) -> np.dtype[np.void]:
    kinds = (("offset", "<u8"), ("size", "<u4"), ("check", "<u4"))
    slots = dict.fromkeys((*SLOTS, *slots_of(captions).values(), *further))
    return np.dtype([("key", f"S{width}"), *((f"{slot}_{what}", kind) for slot in slots for what, kind in kinds)])


def _fits(rows: Any, stat: Stat, captions: tuple[str, ...], further: Further) -> bool:
    if not isinstance(rows, np.ndarray) or rows.ndim != 1 or len(rows) == 0 or rows.dtype.names is None:
        return False
    width = rows.dtype["key"].itemsize if "key" in rows.dtype.names else 1
    if rows.dtype != _dtype(width, captions, further) or rows[0]["key"] != _MAGIC:
        return False
    head = rows[0]
    wanted = (stat.size, stat.stamp, zlib.crc32(",".join(captions).encode()))
    return (int(head["image_offset"]), int(head["caption_offset"]), int(head["image_size"])) == wanted


def _checksum(rows: IndexRows) -> int:
    head = np.array(rows[:1])
    head["image_check"] = 0
    return zlib.crc32(np.ascontiguousarray(rows[1:]).view(np.uint8).data, zlib.crc32(head.tobytes()))


@dataclass
class _Passed:
    """Tells how far the reading of a tar has come; what is read once more is not told again."""

    length: int
    tell: Callable[[int], None]
    place: int = 0

    def to(self, place: int) -> None:
        if self.place < place <= self.length:
            self.tell(place - self.place)
            self.place = place


def _scan(name: str, stat: Stat, captions: tuple[str, ...], cache: str | None, passed: _Passed, further: Further) -> IndexRows:
    with ExitStack() as stack:
        file: IO[bytes]
        if is_remote(name) and cache is None:
            fs, path = filesystem(name)
            file = stack.enter_context(fs.open(path, "rb", block_size=8 << 20, cache_type="readahead"))
        else:
            local = mirror(name, stat, cache) if is_remote(name) and cache else local_path(name)
            file = stack.enter_context(open(local, "rb"))
        _refuse_others(file, name, stat.size)
        builder = SampleBuilder(captions, further)
        measured: dict[int, tuple[int, int]] = {}  # offset -> (check, checksum of the content's beginning)
        for member in tar_members.members(file, stat.size):
            passed.to(member.end)
            if isinstance(member, tar_members.Hole):
                builder.damage(member)
                continue
            if member.kind in ("file", "sparse"):
                is_sparse = member.kind == "sparse"
                file.seek(member.offset if is_sparse else member.offset - HEADER)
                check = zlib.crc32(file.read(HEADER))
                measured[member.offset] = check, zlib.crc32(file.read(min(member.size - HEADER * is_sparse, _DIGESTED)))
            builder.add(member)
        builder.finish()
        return _table(builder, measured, stat, captions, further, _expected(name, damaged=bool(builder.losses.why)))


def _refuse_others(file: IO[bytes], name: str, length: int) -> None:
    """Raises ValueError for what is no uncompressed tar."""
    start = file.read(tar_members.BLOCK)
    for magic, command in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                f"{shown(name)} is compressed: samples cannot be read out of order; unpack it with `{command}` and use the .tar"
            )
    if not any(start) or len(start) < tar_members.BLOCK or tar_members.is_header(start):
        return
    if not any(isinstance(member, tar_members.Member) for member in tar_members.members(file, length)):
        raise ValueError(f"{shown(name)} is no tar file: was its download cut short or answered with an error page?")


def _stats_of(name: str) -> str:
    return re.sub(r"\.tar$", "_stats.json", name)


def _expected(name: str, damaged: bool) -> int | None:
    """The samples that img2dataset wrote, by the `_stats.json` beside the shard; of remote shards only damaged ones' is read."""
    beside = _stats_of(name)
    if beside == name or (is_remote(name) and not damaged):
        return None
    try:
        if is_remote(name):
            fs, path = filesystem(beside)
            text = fs.cat_file(path)
        else:
            text = Path(local_path(beside)).read_bytes()
    except Exception:  # absent; fsspec's backends raise their libraries' own types
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        successes = json.loads(text)["successes"]
        if type(successes) is int and 0 <= successes < 1 << 40:
            return successes
    log.warning("%s holds no count of samples under 'successes': what its shard has lost is estimated without it", shown(beside))
    return None


def _table(
    builder: SampleBuilder,
    measured: dict[int, tuple[int, int]],
    stat: Stat,
    captions: tuple[str, ...],
    further: Further,
    expected: int | None,
) -> IndexRows:
    # of a long key the end, which tells more
    keys = [row.key.encode("utf-8", "surrogateescape")[-_LONGEST_KEY:] for row in builder.rows]
    table = np.zeros(len(keys), _dtype(max(len(_MAGIC), *map(len, keys), 1), captions, further))
    digest, digested = 0, {"image", *slots_of(captions).values(), *further}
    for number, (key, row) in enumerate(zip(keys, builder.rows, strict=True)):
        table[number]["key"] = key
        for slot, place in row.slots.items():
            assert not isinstance(place, str)  # links are followed
            (offset, size, is_sparse), (check, content) = place, measured[place[0]]
            table[number][f"{slot}_offset"] = offset | SPARSE if is_sparse else offset
            table[number][f"{slot}_size"], table[number][f"{slot}_check"] = size, check
            if slot in digested:
                digest = zlib.crc32(repr((key, slot, size, content)).encode(), digest)
    report = {
        "missing": _missing(table, builder.rows, captions),
        "lacking": _lacking(table, builder.rows, captions),
        "losses": dataclasses.asdict(builder.losses),
        "expected": expected,
    }
    text = json.dumps(report).encode()
    head = np.zeros(1, table.dtype)
    report_rows = np.frombuffer(text.ljust(-(-len(text) // table.dtype.itemsize) * table.dtype.itemsize), table.dtype)
    head["key"] = _MAGIC
    head["image_offset"], head["caption_offset"] = stat.size, stat.stamp
    head["image_size"] = zlib.crc32(",".join(captions).encode())
    head["caption_size"], head["json_offset"], head["json_size"] = len(text), len(report_rows), digest
    rows = np.concatenate([head, report_rows, table])
    rows[0]["image_check"] = _checksum(rows)
    return rows


def _missing(table: IndexRows, rows: list[TarSample], captions: tuple[str, ...]) -> dict[str, tuple[int, str]]:
    slots = slots_of(captions).values()
    pictured = table["image_offset"] > 0  # offset 0 is the first header's
    captioned = np.any([table[f"{slot}_offset"] > 0 for slot in slots], axis=0)
    said = np.any([(table[f"{slot}_offset"] > 0) & (table[f"{slot}_size"] > 0) for slot in slots], axis=0)
    lacking = {"missing_image": ~pictured, "missing_caption": pictured & ~captioned, "empty_caption": pictured & captioned & ~said}
    return {name: _counted(mask, rows) for name, mask in lacking.items()}


def _lacking(table: IndexRows, rows: list[TarSample], captions: tuple[str, ...]) -> dict[str, tuple[int, str]]:
    there = {name: table[f"{slot}_offset"] > 0 for name, slot in slots_of(captions).items()}
    captioned = np.any(list(there.values()), axis=0) & (table["image_offset"] > 0)
    found = {name: _counted(captioned & ~has, rows) for name, has in there.items()}
    return {name: counted for name, counted in found.items() if counted[0]}


def _counted(mask: NDArray[np.bool_], rows: list[TarSample]) -> tuple[int, str]:
    """How many samples, and the key of the first."""
    return int(mask.sum()), rows[int(mask.argmax())].key if mask.any() else ""
