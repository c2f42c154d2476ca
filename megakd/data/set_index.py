"""What the indexes of a set's shards tell of them, kept in one file: a start reads it in the place of a file a shard.

Its entries are those shards' reports, each with the size and date of the tar that it is of; another size or date, and that shard's own
index is read. The indexes themselves are opened when samples of their shards are read. The file is JSON behind its checksum; which set it
is of, its name says: a digest of the shards' names and of the members that are indexed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data import tar_index
from megakd.data.storage import SET_INDEX, Stat, is_remote, local_path, shown
from megakd.data.tar_index import Further, Known
from megakd.recipe.credentials import unsigned
from megakd.runtime.console import LongWork, with_progress
from megakd.runtime.files import atomic_file

SMALLEST = 32  # shards of a set that has such a file; fewer indexes are read as fast
_FORMAT = "megakd-set-1"
_UNREADABLE = "check the disk or the network, and its permissions"

log = logging.getLogger("megakd.data")


def known(
    named: list[tuple[str, Stat]],
    members: tuple[str, ...],
    cache: str | None,
    further: Further,
    rank: int,
    world: int,
    barrier: Callable[[], None],
) -> tuple[list[Known], NDArray[np.bool_]]:
    """What is known of each shard, and (shards,) of whose index the checksum was not compared, as it was not opened.

    Each rank sees to it that the shards [rank::world] have an index, waits at the barrier, then builds those that are still missing where
    the ranks do not share a disk. Raises ValueError for shards that cannot be read.
    """
    names, kept = [name for name, _ in named], list[Known | None]([None]) * len(named)
    stored = _File.of(names, members, cache, further)
    if stored is not None:
        kept = stored.read(named)
    told = np.array([entry is not None for entry in kept])
    failure: ValueError | OSError | None = None
    try:
        new = []
        for number in with_progress(range(rank, len(named), world), "reading the indexes", "shards"):
            if told[number] and tar_index.is_stored(named[number][0], members, cache, further):
                continue
            rows = tar_index.load_checked(*named[number], members, cache, further)
            if rows is None:
                new.append(number)
            else:
                kept[number] = _agreed(kept[number], tar_index.known(rows), names[number], stored)
        with LongWork("indexing", sum(named[number][1].size for number in new), "bytes") as work:
            for number in new:
                rows = tar_index.build(*named[number], members, cache, further, work.advance)
                kept[number] = _agreed(kept[number], tar_index.known(rows), names[number], stored)
    except (ValueError, OSError) as error:  # raised behind the barrier, where the others wait
        failure = error
    barrier()
    if isinstance(failure, OSError):
        raise ValueError(f"a shard cannot be read: {failure}; {_UNREADABLE}") from failure
    if failure is not None:
        raise failure
    try:
        left = [number for number, entry in enumerate(kept) if entry is None]
        for number in with_progress(left, "reading the indexes", "shards"):
            kept[number] = tar_index.known(tar_index.load_or_build(*named[number], members, cache, further, checked=True))
    except OSError as error:
        raise ValueError(f"a shard cannot be read: {error}; {_UNREADABLE}") from error
    found = [tar_index.with_stats_of_today(entry, name) for entry, name in zip(kept, names, strict=True) if entry is not None]
    if stored is not None and (stored.outdated or not told.all()):
        stored.write(named, found, replace=rank == 0)
    return found, told


def forget(names: list[str], members: tuple[str, ...], cache: str | None, further: Further) -> None:
    """Remove the file of a set, as it tells of other shards than there are. The next start reads their own indexes, and writes it anew."""
    if (stored := _File.of(names, members, cache, further)) is not None:
        stored.remove()


def _agreed(entry: Known | None, own: Known, name: str, stored: _File | None) -> Known:
    """What both say of a shard. All ranks go by the entry: ValueError, and the file goes, where its own index says otherwise."""
    if entry is None or (entry.samples, entry.digest) == (own.samples, own.digest):
        return entry or own
    assert stored is not None, "it gave the entry"
    stored.remove()
    raise ValueError(
        f"{shown(name)} has {own.samples} samples, and the index of its set says {entry.samples} of another content: it was written "
        f"anew at the same size and date. That index ({SET_INDEX}) is removed; start again, and the shards' own are read"
    )


class _File:
    """The file of one set. places: where it may be, best first, as a tar's own index."""

    def __init__(self, places: list[Path], first: str) -> None:
        self._places, self._first = places, first
        self._outdated: dict[Path, int] = {}  # of files that do not tell of every shard as it is now, when they were written

    @classmethod
    def of(cls, names: list[str], members: tuple[str, ...], cache: str | None, further: Further) -> _File | None:
        """None for a set of a few shards."""
        if len(names) < SMALLEST:
            return None
        absolute = [unsigned(name) if is_remote(name) else os.path.abspath(local_path(name)) for name in names]
        text = json.dumps([_FORMAT, members, further, absolute])
        name = hashlib.sha256(text.encode()).hexdigest()[:24] + SET_INDEX
        beside = None if is_remote(names[0]) else os.path.join(os.path.dirname(absolute[0]), name)
        return cls([Path(place) for place in tar_index.places(name, beside, cache)], names[0])

    def read(self, named: list[tuple[str, Stat]]) -> list[Known | None]:
        """What is known of each shard, None where no entry fits it as it is now. A damaged file is logged and not used."""
        for path in self._places:
            try:
                head, _, body = path.read_bytes().partition(b"\n")
                written = path.stat().st_mtime_ns
            except OSError:
                continue
            try:
                if json.loads(head) != zlib.crc32(body):
                    raise ValueError("another checksum")
                entries = json.loads(body)
                told = [_known(entry, stat) for entry, (_, stat) in zip(entries, named, strict=True)]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                log.warning("the index of the set that begins with %s is damaged and is written anew", shown(self._first))
                self._outdated[path] = written
            else:
                if None in told:
                    self._outdated[path] = written
                return told
        return [None] * len(named)

    @property
    def outdated(self) -> bool:
        return bool(self._outdated)

    def remove(self) -> None:
        """From every place; one that cannot be removed is logged."""
        for path in self._places:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("the index of the set that begins with %s cannot be removed: %s", shown(self._first), error)

    def write(self, named: list[tuple[str, Stat]], found: list[Known], *, replace: bool) -> None:
        """To the first place that can be written, if any. replace: also where another rank has written one since this rank has read it."""
        entries = [
            [stat.size, stat.stamp, known.samples, known.digest, known.report()] for (_, stat), known in zip(named, found, strict=True)
        ]
        body = json.dumps(entries, separators=(",", ":")).encode()
        for path in self._places:
            try:
                if not replace and path.is_file() and path.stat().st_mtime_ns != self._outdated.get(path):
                    return
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as partial:
                    partial.write_bytes(b"%d\n%s" % (zlib.crc32(body), body))
                return
            except OSError as error:
                log.debug("the index of a set cannot be stored as %s: %s", path, error)


def _known(entry: list[Any], stat: Stat) -> Known | None:
    size, stamp, samples, digest, report = entry
    if type(samples) is not int or type(digest) is not int or samples < 0:
        raise ValueError("no count, or no digest")
    return Known.of_report(report, samples, digest) if (size, stamp) == (stat.size, stat.stamp) else None
