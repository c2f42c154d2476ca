"""A set of shards seen as one long array of samples, each read by its index.

1. `patterns.expand` turns the recipe's patterns into shards that exist.
2. `index` knows where the members of each sample lie in its tar.
3. `ShardSet` maps a sample's index to its shard and row, and `storage.Reader` fetches its bytes in one read.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megakd.data import index as tar_index
from megakd.data.bad import BadCounter, BadSample
from megakd.data.index import Rows, Slot
from megakd.data.patterns import expand, expand_with_stats
from megakd.data.storage import Reader, Stat
from megakd.recipe import Data

__all__ = ["Sample", "ShardSet", "expand"]

# Memory maps stay far below the kernel's limit of 65530 a process, whatever the number of shards.
_OPEN_INDEXES = 1024
# Members of one sample lie side by side in a tar; one read of all is cheaper than two as long as little lies between them.
_LARGEST_GAP = 64 << 10
# Requests under way at a time where every read is a round trip.
_REMOTE_READS = 16

log = logging.getLogger("megakd.data")


@dataclass(frozen=True)
class Sample:
    """The bytes of one sample's members; those that were not asked for, or that it lacks, are absent."""

    where: str
    members: dict[Slot, bytes]


@dataclass
class ShardSet:
    """All samples of some shards, by index. Cheap to pickle and to fork: rows stay on disk until they are read."""

    names: list[str]
    stats: list[Stat]
    data: Data
    starts: np.ndarray[Any, np.dtype[np.int64]]  # first sample of each shard, and the number of all samples
    known_bad: BadCounter  # what the indexes say, without one image read
    _reader: Reader
    _rows: OrderedDict[int, Rows] = field(default_factory=OrderedDict)

    @classmethod
    def open(cls, data: Data, rank: int, world: int, barrier: Callable[[], None]) -> ShardSet:
        """The training set `data.train`, checked: every sample needs an image and a caption.

        Raises ValueError for missing, compressed or empty shards, and when more than data.max_bad_fraction of the samples
        lack an image or a caption.
        """
        if data.train is None:
            raise ValueError("data.train: missing; give image-text shards, such as '/data/cc12m/{00000..01242}.tar'")
        try:
            shards = cls.open_set(data.train, data, rank, world, barrier)
        except ValueError as error:
            raise ValueError(f"data.train: {error}") from error
        if shards.known_bad.total >= shards.known_bad.seen:
            raise ValueError(
                f"data.train = {data.train!r}: none of the {len(shards)} samples has both an image and a caption "
                f"({shards.known_bad.by_reason() or 'the shards are empty'}). Captions are read from .{data.caption} members "
                f"(data.caption). Example: {shards.known_bad.example}"
            )
        shards.known_bad.check(data.max_bad_fraction, at_least=1)
        return shards

    @classmethod
    def open_set(cls, patterns: str | list[str], data: Data, rank: int, world: int, barrier: Callable[[], None]) -> ShardSet:
        """Any set, an evaluation's for example, without a word about captions; `data` gives caption, cache and max_pixels.

        Each rank indexes the shards [rank::world], waits at the barrier, then loads all; it builds those that it still misses,
        which happens where the ranks do not share a disk.
        """
        named = expand_with_stats(patterns)
        failure: ValueError | OSError | None = None
        try:
            for name, stat in named[rank::world]:
                _index(name, stat, data)
        except (ValueError, OSError) as error:  # the others wait: they must come through before this rank fails
            failure = error
        barrier()
        if failure is not None:
            raise failure
        bad, samples = BadCounter(), []
        for name, stat in named:
            known = tar_index.known(_index(name, stat, data))
            samples.append(known.samples)
            bad.seen += known.samples + known.truncated
            for reason in ("missing_image", "missing_caption", "empty_caption"):
                bad.add(reason, name, getattr(known, reason))
            bad.add("truncated_tar", name, int(known.truncated))
        if sum(samples) == 0:
            raise ValueError(f"{patterns!r}: {len(named)} shards, but not one sample in them (the first is {named[0][0]})")
        starts = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)
        log.info("%d samples in %d shards", starts[-1], len(named))
        return cls([name for name, _ in named], [stat for _, stat in named], data, starts, bad, Reader(data.cache))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": OrderedDict()}

    @property
    def signature(self) -> int:
        """A checksum of the shards' base names and lengths. Equal on all ranks and at resume, or a position means nothing."""
        text = "\n".join(os.path.basename(name) for name in self.names)
        return zlib.crc32(text.encode(), zlib.crc32(self.starts.tobytes()))

    def where(self, index: int) -> str:
        """'shard: key' of a sample, for people to read."""
        shard, row = self._locate(index)
        return self._label(shard, row)

    def read(self, index: int, needs: tuple[Slot, ...]) -> Sample:
        """The members `needs` of sample `index`, as far as it has them.

        Raises BadSample when a needed image or caption is missing or empty, or its bytes cannot be read; FileNotFoundError
        when the shard is gone.
        """
        return self._read(*self._locate(index), needs)

    def _read(self, shard: int, row: np.void, needs: tuple[Slot, ...]) -> Sample:
        where = self._label(shard, row)
        spans = {slot: (int(row[f"{slot}_offset"]), int(row[f"{slot}_size"])) for slot in needs}
        spans = {slot: span for slot, span in spans.items() if span[0] > 0}
        if "image" in needs and "image" not in spans:
            raise BadSample("missing_image", "no image member", where)
        if "caption" in needs and "caption" not in spans:
            raise BadSample("missing_caption", f"no .{self.data.caption} member", where)
        if "caption" in spans and spans["caption"][1] == 0:
            raise BadSample("empty_caption", f"its .{self.data.caption} member has no bytes", where)
        try:
            return Sample(where, self._fetch(shard, spans))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.names[shard]} is gone since the run began") from error
        except OSError as error:
            raise BadSample("read_error", str(error), where) from error

    def read_each(self, indices: list[int], needs: tuple[Slot, ...]) -> Iterator[Sample | BadSample]:
        """read() of each, in order; a bad sample is yielded, not raised. Remote shards are asked many at a time."""

        def one(place: tuple[int, np.void]) -> Sample | BadSample:
            try:
                return self._read(*place, needs)
            except BadSample as bad:
                return bad

        if not any(self._reader.is_slow(name) for name in self.names[:1]):
            yield from map(one, map(self._locate, indices))
            return
        # Located in this thread: the open indexes have no lock, and np.load parses headers with `ast`, which in Python 3.11.7 now and
        # then raises SystemError "AST constructor recursion depth mismatch" where two threads do so at once (gh-106905).
        places = [self._locate(index) for index in indices]
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            yield from pool.map(one, places)

    def _fetch(self, shard: int, spans: dict[Slot, tuple[int, int]]) -> dict[Slot, bytes]:
        if not spans:
            return {}
        first = min(offset for offset, _ in spans.values())
        end = max(offset + size for offset, size in spans.values())
        if end - first > sum(size for _, size in spans.values()) + _LARGEST_GAP:
            return {slot: self._bytes(shard, offset, size) for slot, (offset, size) in spans.items()}
        data = self._bytes(shard, first, end - first)
        return {slot: data[offset - first : offset - first + size] for slot, (offset, size) in spans.items()}

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        data = self._reader.read(self.names[shard], self.stats[shard], offset, size)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes instead of {size} at {offset}: the shard has changed since it was indexed")
        return data

    def _locate(self, index: int) -> tuple[int, np.void]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        rows = self._rows.get(shard)
        if rows is None:
            rows = _index(self.names[shard], self.stats[shard], self.data)
            while len(self._rows) >= _OPEN_INDEXES:
                self._rows.popitem(last=False)
            self._rows[shard] = rows
        row: np.void = rows[index - int(self.starts[shard]) + 1]  # row 0 is the tar's own
        return shard, row

    def _label(self, shard: int, row: np.void) -> str:
        key = bytes(row["key"]).decode("utf-8", "backslashreplace")
        return f"{self.names[shard]}: {key.encode('unicode_escape').decode()}"  # a key may hold terminal escapes


def _index(name: str, stat: Stat, data: Data) -> Rows:
    rows = tar_index.load(name, stat, data.caption, data.cache)
    return tar_index.build(name, stat, data.caption, data.cache) if rows is None else rows
