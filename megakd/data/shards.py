"""A set of shards as one long array of samples, each read by its index.

1. `patterns` turns the recipe's patterns into shards that exist.
2. `tar_index` knows where the members of each sample lie in its tar, `set_index` what the indexes of all shards tell.
3. `ShardSet` maps a sample's index to its shard and row, and `storage.Reader` fetches its bytes in one read.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data import set_index, tar_index
from megakd.data.bad_samples import OF_CAPTIONS, BadCounter, BadSample, Reason
from megakd.data.captions import CaptionPolicy
from megakd.data.mixture import Source
from megakd.data.patterns import expand, expand_sources, expand_with_stats
from megakd.data.samples import Slot
from megakd.data.storage import Reader, Stat, shown
from megakd.data.tar_index import HEADER, SPARSE, Further, IndexRows, Known
from megakd.data.tar_members import expand as expand_sparse
from megakd.recipe import Data
from megakd.recipe.credentials import unsigned
from megakd.recipe.sources import PairSource

__all__ = ["Sample", "ShardSet", "expand"]

# Memory maps stay far below the kernel's limit of 65530 a process, whatever the number of shards.
_OPEN_INDEXES = 1024
_LARGEST_GAP = 64 << 10  # bytes between two members that are read at once
_CHANGED = "the shard has changed since it was indexed"
_REMOTE_READS = 16  # requests under way at a time
_OF_DR = ". DataCompDR's own tars hold neither: unpack each with DataComp's tar of that number, and pack both into one"

log = logging.getLogger("megakd.data")


@dataclass(frozen=True)
class Sample:
    """The bytes of one sample's requested members, as far as it has them.

    box: (left, upper, right, lower), what is shown of the image; None: all of it.
    """

    where: str
    members: dict[Slot, bytes]
    box: tuple[int, int, int, int] | None = None


@dataclass
class ShardSet:
    """All samples of some shards, by index. Cheap to pickle and to fork: rows of the indexes stay on disk until they are read.

    captions: where they are; what may be read are those members and the ones of SLOTS. lacking: as `Known`'s, with the first sample.
    """

    names: list[str]
    stats: list[Stat]
    data: Data
    starts: np.ndarray[Any, np.dtype[np.int64]]  # first sample of each shard, and the number of all samples
    known_bad: BadCounter  # by the indexes, without an image read
    digest: int  # of the samples' keys, sizes and first bytes
    captions: CaptionPolicy
    lacking: dict[str, tuple[int, str]]
    sources: tuple[Source, ...]  # of a mixture, whose samples follow each other in this order; weights are sizes where none is given
    _reader: Reader
    _unchecked: NDArray[np.bool_]  # (shards,) whose index's checksum has not been compared yet
    further: Further = ()  # members that may be read beside those, each by its extension
    _rows: OrderedDict[int, IndexRows] = field(default_factory=OrderedDict)

    @classmethod
    def open(
        cls, data: Data, rank: int, world: int, barrier: Callable[[], None], *, captions: bool = True, further: Further = ()
    ) -> ShardSet:
        """The training set `data.train`, whose samples need an image and, unless `captions` is False, a caption.

        Raises ValueError for missing, compressed or empty shards, when more than data.max_bad_fraction of the samples lack either, and for
        a source of which none can be used.
        """
        if data.train is None:
            raise ValueError("data.train: missing; give image-text shards, such as '/data/cc12m/{00000..01242}.tar'")
        try:
            shards = cls.open_set(data.train, data, rank, world, barrier, captions=captions, policy=CaptionPolicy.of(data), further=further)
        except ValueError as error:
            raise ValueError(f"data.train: {error}") from error
        if not captions:
            shards.known_bad = shards.known_bad.without(*OF_CAPTIONS)
        shards._check_usable(captions)
        shards.known_bad.check(data.max_bad_fraction, at_least=1)
        return shards

    def _check_usable(self, captions: bool) -> None:
        """Raises ValueError where no sample of the set, or none of a source, can be used by the indexes."""
        sets = [(self.data.train_in_words, len(self), self.known_bad)]
        sets += [(f"data.train.{one.name}", one.samples, self.known_bad.by_source[one.name]) for one in self.sources]
        for key, samples, bad in sets:
            if bad.total >= bad.seen:
                needed = "both an image and a caption" if captions else "an image"
                read = "data.caption" if self.data.captions is None else "data.captions"
                read_from = f"Captions are read from {self.captions.spelled_members} members ({read}). " if captions else ""
                raise ValueError(
                    f"{key}: none of the {samples} samples has {needed} ({bad.by_reason() or 'the shards are empty'}). "
                    f"{read_from}Example: {bad.example}{_OF_DR if self.further else ''}"
                )

    @classmethod
    def open_set(
        cls,
        patterns: str | list[str] | Mapping[str, PairSource],
        data: Data,
        rank: int,
        world: int,
        barrier: Callable[[], None],
        *,
        captions: bool = False,
        policy: CaptionPolicy | None = None,
        further: Further = (),
    ) -> ShardSet:
        """Any set; `data` gives caption, cache and max_pixels. captions: missing ones are logged. policy: where they are; default: caption.

        Each rank indexes the shards [rank::world], waits at the barrier, then loads all, and builds those that are still missing where the
        ranks do not share a disk. Rank 0 logs what is lost or not used, at every start.
        Raises ValueError for shards that cannot be read, and where there is not one sample, in all or in a source.
        """
        policy = policy or CaptionPolicy.member(data.caption)
        if isinstance(patterns, Mapping):
            by_source = expand_sources({name: one.shards for name, one in patterns.items()})
        else:
            by_source = {"": expand_with_stats(patterns)}
        named = [shard for shards in by_source.values() for shard in shards]
        indexes, unchecked = set_index.known(named, policy.members, data.cache, further, rank, world, barrier)
        names, samples = [name for name, _ in named], [known.samples for known in indexes]
        lacking, sources, bad, end = _lacking(names, indexes), list[Source](), BadCounter(), 0
        for source, shards_of in by_source.items():
            first, end = end, end + len(shards_of)
            part = names[first:end], indexes[first:end]
            own, count, words = _known_bad(*part, source), sum(samples[first:end]), f"source {source}" if source else repr(patterns)
            if rank == 0:
                _log_losses(words, own, *part, captions, _lacking(*part))
            if count == 0:
                lost = f"; {own.by_reason()}, for example {own.example}" if own.total else ""
                raise ValueError(f"{words}: {len(shards_of)} shards, but not one sample in them (the first is {shown(names[first])}){lost}")
            bad.merge(own)
            if isinstance(patterns, Mapping):
                weight = patterns[source].weight
                sources.append(Source(source, count, float(count if weight is None else weight)))
        starts = np.concatenate([[0], np.cumsum(samples)]).astype(np.int64)
        log.info("%d samples in %d shards", starts[-1], len(named))
        digest = zlib.crc32(repr([known.digest for known in indexes]).encode())
        place = tuple(sources), Reader(data.cache), unchecked, further
        return cls(names, [stat for _, stat in named], data, starts, bad, digest, policy, lacking, *place)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": OrderedDict()}

    @property
    def signature(self) -> int:
        """A checksum of the shards' base names, lengths and content, not of dates and folders. A position means nothing without it."""
        return zlib.crc32(self.digest.to_bytes(4, "little"), self.signature_of_names)

    @property
    def signature_of_order(self) -> int:
        """The signature, with a mixture's shares, which decide as well which sample a position is."""
        return zlib.crc32(repr(self.sources).encode(), self.signature) if self.sources else self.signature

    @property
    def signature_of_names(self) -> int:
        """The signature without the content, as earlier checkpoints and stores have it."""
        text = "\n".join(os.path.basename(unsigned(name)) for name in self.names)
        return zlib.crc32(text.encode("utf-8", "surrogateescape"), zlib.crc32(self.starts.tobytes()))

    def where(self, index: int) -> str:
        """'shard: key' of a sample, for messages."""
        return self._label(*self._locate(index))

    def keys(self, shard: int) -> NDArray[np.bytes_]:
        """(samples,) of a shard: their keys, of long ones the end."""
        return np.asarray(self._samples_of(shard)["key"])

    def read(self, index: int, needs: tuple[Slot, ...]) -> Sample:
        """The members `needs` of sample `index`, as far as it has them.

        Raises BadSample when a needed image or caption is missing or empty, or bytes cannot be read; FileNotFoundError without the shard.
        """
        return self._read(*self._locate(index), needs)

    def _read(self, shard: int, row: np.void, needs: tuple[Slot, ...]) -> Sample:
        where = self._label(shard, row)
        places = {slot: _MemberPlace(*(int(row[f"{slot}_{what}"]) for what in ("offset", "size", "check"))) for slot in needs}
        places = {slot: place for slot, place in places.items() if place.offset > 0}
        if "image" in needs and "image" not in places:
            raise BadSample("missing_image", "no image member", where)
        if asked := [slot for slot in self.captions.needs if slot in needs]:
            if not any(slot in places for slot in asked):
                raise BadSample("missing_caption", f"no {self.captions.spelled_members} member", where)
            if not any(slot in places and places[slot].size for slot in asked):
                raise BadSample("empty_caption", f"its {self.captions.spelled_members} member has no bytes", where)
        try:
            return Sample(where, self._fetch(shard, places))
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, f"{shown(self.names[shard])} is gone since the run began") from error
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
        # Located in this thread: the open indexes have no lock, and two threads in np.load, which parses with `ast`, make Python 3.11.7 now
        # and then raise SystemError "AST constructor recursion depth mismatch" (gh-106905).
        places = [self._locate(index) for index in indices]
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            yield from pool.map(one, places)

    def _fetch(self, shard: int, places: dict[Slot, _MemberPlace]) -> dict[Slot, bytes]:
        if not places:
            return {}
        first, end = min(place.start for place in places.values()), max(place.end for place in places.values())
        if end - first > sum(place.end - place.start for place in places.values()) + _LARGEST_GAP:
            return {slot: _content(place, self._bytes(shard, place.start, place.end)) for slot, place in places.items()}
        data = self._bytes(shard, first, end)
        return {slot: _content(place, data[place.start - first : place.end - first]) for slot, place in places.items()}

    def _bytes(self, shard: int, start: int, end: int) -> bytes:
        data = self._reader.read(self.names[shard], self.stats[shard], start, end - start)
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes instead of {end - start} at {start}: {_CHANGED}")
        return data

    def _locate(self, index: int) -> tuple[int, np.void]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        rows = self._rows.get(shard)
        if rows is None:
            rows = self._samples_of(shard)
            while len(self._rows) >= _OPEN_INDEXES:
                self._rows.popitem(last=False)
            self._rows[shard] = rows
        row: np.void = rows[index - int(self.starts[shard])]
        return shard, row

    def _samples_of(self, shard: int) -> IndexRows:
        name, members = self.names[shard], self.captions.members
        index = tar_index.load_or_build(
            name, self.stats[shard], members, self.data.cache, self.further, checked=bool(self._unchecked[shard])
        )
        self._unchecked[shard] = False
        rows = tar_index.samples(index)
        if len(rows) != int(self.starts[shard + 1] - self.starts[shard]):
            set_index.forget(self.names, members, self.data.cache, self.further)  # which the start after this one would believe again
            raise ValueError(f"{shown(name)} has {len(rows)} samples now, other than when the run began: {_CHANGED}; start it again")
        return rows

    def _label(self, shard: int, row: np.void) -> str:
        key = bytes(row["key"]).decode("utf-8", "backslashreplace")
        ends = itertools.accumulate(source.samples for source in self.sources)
        source = next((f"{one.name}: " for one, end in zip(self.sources, ends, strict=True) if self.starts[shard] < end), "")
        return f"{source}{shown(self.names[shard])}: {key.encode('unicode_escape').decode()}"  # a key may hold terminal escapes


@dataclass(frozen=True)
class _MemberPlace:
    """A member by its index. It is read from `start` to `end`, with the 512 bytes whose checksum is `check`."""

    offset: int
    size: int
    check: int

    @property
    def start(self) -> int:
        return self.offset & ~SPARSE if self.offset & SPARSE else self.offset - HEADER

    @property
    def end(self) -> int:
        return (self.offset & ~SPARSE) + self.size


def _content(place: _MemberPlace, data: bytes) -> bytes:
    """The member's bytes of those from its `start` to its `end`. Raises OSError when its header is not the one that was indexed."""
    if zlib.crc32(data[:HEADER]) != place.check:
        raise OSError(f"another member lies at byte {place.start}: {_CHANGED}")
    return expand_sparse(data) if place.offset & SPARSE else data[HEADER:]


def _known_bad(names: list[str], indexes: list[Known], source: str) -> BadCounter:
    """Counts over the samples that the indexes have, and those that they know to be lost. source: of a mixture, "" without one."""
    sound = [known.samples for known in indexes if not known.losses.why]
    elsewhere, alike = round(sum(sound) / len(sound)) if sound else None, len(set(sound)) == 1
    bad = BadCounter()
    for name, known in zip(names, indexes, strict=True):
        lost = known.lost(elsewhere, alike=alike)
        fewer = "its _stats.json tells of more samples; remove that file if some were taken out on purpose"
        counts: list[tuple[Reason, int, str]] = [("truncated_tar", lost, known.losses.why or fewer)]
        counts += [("missing_image", *known.missing_image), ("missing_caption", *known.missing_caption)]
        counts += [("empty_caption", *known.empty_caption)]
        counts += [("unused_members", count, f"{example}, {why}") for why, (count, example) in known.losses.dropped.items()]
        for reason, count, example in counts:
            bad.add(reason, f"{source and f'{source}: '}{shown(name)}: {shown(example)}", count)
        bad.seen += known.samples + lost + sum(count for count, _ in known.losses.dropped.values())
    return replace(bad, by_source={source: bad}) if source else bad


def _lacking(names: list[str], indexes: list[Known]) -> dict[str, tuple[int, str]]:
    lacking: dict[str, tuple[int, str]] = {}
    for name, known in zip(names, indexes, strict=True):
        for extension, (count, example) in known.lacking.items():
            before, first = lacking.get(extension, (0, f"{shown(name)}: {shown(example)}"))
            lacking[extension] = (before + count, first)
    return lacking


def _log_losses(
    words: str,
    bad: BadCounter,
    names: list[str],
    indexes: list[Known],
    captions: bool,
    lacking: dict[str, tuple[int, str]],
) -> None:
    for reason, count in bad.counts.items():
        if reason in OF_CAPTIONS and not captions:
            continue
        log.warning("%s: %d of %d samples cannot be used, %s: %s", words, count, bad.seen, reason, bad.examples[reason])
    for extension, (count, example) in lacking.items() if captions else ():
        told = "%s: %d of %d samples have no .%s member, so that their captions are drawn from the others: %s"
        log.warning(told, words, count, bad.seen, extension, example)
    unused: dict[str, tuple[int, str]] = {}
    for name, known in zip(names, indexes, strict=True):
        for kind, (count, example) in known.losses.unused.items():
            before, first = unused.get(kind, (0, f"{shown(name)}: {shown(example)}"))
            unused[kind] = (before + count, first)
    for kind, (count, example) in unused.items():
        log.warning("%s: %d members that look like data are not used: %s. The first: %s", words, count, kind, example)
