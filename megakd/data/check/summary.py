"""What the samples of a set are together: counts, quantiles, what is there twice, and whether a run would refuse it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.bad_samples import BadCounter
from megakd.data.caption_survey import survey
from megakd.data.check.measure import SIGNALS, Measured, Rows, TokenCounter, chosen
from megakd.data.mixture import order_of_pairs
from megakd.data.shards import ShardSet
from megakd.data.transforms import FORMATS
from megakd.runtime.console import with_progress

QUANTILES = {"least": 0.0, "1 %": 0.01, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}
# Edges of histograms; what lies beyond them is counted in the first and the last bar.
ASPECTS = (1 / 3, 1 / 2, 0.65, 3 / 4, 0.9, 1.1, 4 / 3, 1.55, 2.0, 3.0)
SIDES = (64, 128, 224, 336, 512, 768, 1024, 2048)
CHARACTERS = (10, 20, 40, 60, 80, 120, 160, 240, 320, 640)
_GROUPS, _MEMBERS = 8, 3  # of equal samples that are named


@dataclass(frozen=True)
class Histogram:
    """counts: one more than edges; counts[i] lie below edges[i] and not below the edge before."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: NDArray[Any], edges: tuple[float, ...]) -> Histogram:
        counts = np.bincount(np.searchsorted(np.array(edges), values, side="right"), minlength=len(edges) + 1)
        return cls(edges, tuple(counts.tolist()))


@dataclass(frozen=True)
class Equal:
    """Samples of one image or of one caption. members: the first of them, by index."""

    count: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class Repeats:
    """distinct: of all; repeated: samples whose like came before; groups: the largest."""

    distinct: int
    repeated: int
    groups: tuple[Equal, ...]

    @classmethod
    def of(cls, index_N: NDArray[np.int64], *keys_NK: NDArray[np.uint64]) -> Repeats:
        """Of samples `index_N`, which are equal where their rows of all keys are."""
        count = len(index_N)
        if not count:
            return cls(0, 0, ())
        columns = [column for key_NK in keys_NK for column in key_NK.T]
        order = np.lexsort(columns)
        differs = np.zeros(count - 1, np.bool_)
        for column in columns:
            ordered = column[order]
            differs |= ordered[1:] != ordered[:-1]
        starts = np.flatnonzero(np.concatenate([[True], differs]))
        sizes = np.diff(np.append(starts, count))
        # of groups of one size the one that comes first
        largest = np.lexsort((order[starts], -sizes))[:_GROUPS]
        groups = [
            Equal(int(sizes[group]), tuple(index_N[order[starts[group] : starts[group] + min(sizes[group], _MEMBERS)]].tolist()))
            for group in largest
            if sizes[group] > 1
        ]
        return cls(len(starts), count - len(starts), tuple(groups))


@dataclass(frozen=True)
class Summary:
    """index_N: the samples that were read, of `samples`; usable_N: which of them a run would train on.

    known: by the indexes, of all samples and of those that damage took; bad: of what was read. quantiles: by name, then by QUANTILES.
    sources: of captions, by name: (share that is drawn, usable samples that have some there, how many these are); {} without a choice.
    signals: count and an example's index. refusals: why a run would not train on this, no more than one of each kind.
    """

    samples: int
    index_N: NDArray[np.int64]
    usable_N: NDArray[np.int64]
    known: BadCounter
    bad: BadCounter
    quantiles: dict[str, dict[str, float]]
    histograms: dict[str, Histogram]
    formats: dict[str, int]
    context: int | None
    cut: int
    sources: dict[str, tuple[float, int, int]]
    signals: dict[str, tuple[int, int | None]]
    repeats: dict[str, Repeats]
    extremes: dict[str, tuple[int, ...]]
    refusals: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every sample was read."""
        return len(self.index_N) == self.samples

    @property
    def lost(self) -> int:
        """Samples that are in no row of the indexes."""
        return self.known.seen - self.samples

    def to_json(self, shards: ShardSet) -> dict[str, Any]:
        def named(name: str, found: Repeats) -> dict[str, Any]:
            groups: list[dict[str, Any]] = [
                {"count": one.count, "samples": [shards.where(index) for index in one.members]} for one in found.groups
            ]
            if name == "captions":
                groups = [group | {"text": caption_at(shards, one.members[0])} for group, one in zip(groups, found.groups, strict=True)]
            return {"distinct": found.distinct, "repeated": found.repeated, "groups": groups}

        def dropped(counter: BadCounter) -> dict[str, Any]:
            return {reason: {"count": count, "example": counter.examples.get(reason)} for reason, count in counter.counts.items()}

        return {
            "sources": self.by_source(shards),
            "shards": len(shards.names),
            "bytes": sum(stat.size for stat in shards.stats),
            "samples": self.samples,
            "lost": self.lost,
            "read": len(self.index_N),
            "usable": len(self.usable_N),
            "dropped": {"by_indexes": dropped(self.known), "by_reading": dropped(self.bad)},
            "bad_fraction": {
                "by_indexes": self.known.fraction,
                "by_reading": self.bad.fraction,
                "max_bad_fraction": shards.data.max_bad_fraction,
            },
            "refused": list(self.refusals),
            "quantiles": self.quantiles,
            "histograms": {name: {"edges": one.edges, "counts": one.counts} for name, one in self.histograms.items()},
            "formats": self.formats,
            "tokens": None if self.context is None else {"context_length": self.context, "cut": self.cut},
            "captions": {name: {"share": one, "samples": has, "captions": count} for name, (one, has, count) in self.sources.items()},
            "signals": {
                name: {"count": count, "example": None if index is None else shards.where(index)}
                for name, (count, index) in self.signals.items()
            },
            "repeats": {name: named(name, found) for name, found in self.repeats.items()},
        }

    def by_source(self, shards: ShardSet) -> dict[str, dict[str, float]]:
        """Of each source of a mixture; {} where the shards have no names. share: by its weight, of each batch."""
        ends = np.cumsum([source.samples for source in shards.sources], dtype=np.int64)
        read, usable = (np.diff(np.searchsorted(index_N, ends), prepend=0).tolist() for index_N in (self.index_N, self.usable_N))
        total = sum(source.weight for source in shards.sources)
        return {
            source.name: {"samples": source.samples, "share": source.weight / total, "read": read[number], "usable": usable[number]}
            for number, source in enumerate(shards.sources)
        }


def summarise(
    shards: ShardSet, index_N: NDArray[np.int64], measured: Measured, counter: TokenCounter | None, captions: bool, batch: int | None
) -> Summary:
    """Of the samples `index_N`, measured in order. batch: of the recipe, None where there is none."""
    usable_N = index_N[measured.rows["usable"]]
    rows = measured.rows[measured.rows["usable"]]
    quantiles, histograms, extremes = _sizes(rows, usable_N, counter, captions)
    keys = {"images": ["image"], "captions": ["caption"], "pairs": ["image", "caption"]} if captions else {"images": ["image"]}
    compared = with_progress(keys.items(), "comparing", "kinds")
    repeats = {name: Repeats.of(usable_N, *(rows[key] for key in of)) for name, of in compared}
    signals: dict[str, tuple[int, int | None]] = {}
    for bit, name in enumerate(SIGNALS) if captions else ():
        has = np.flatnonzero(rows["signals"] >> bit & 1)
        signals[name] = len(has), int(usable_N[has[0]]) if len(has) else None
    formats = np.bincount(rows["format"], minlength=len(FORMATS)).tolist()
    known = shards.known_bad if captions else shards.known_bad.without("missing_caption", "empty_caption")
    return Summary(
        samples=len(shards),
        index_N=index_N,
        usable_N=usable_N,
        known=known,
        bad=measured.bad,
        quantiles=quantiles,
        histograms=histograms,
        formats={name: count for name, count in zip(FORMATS, formats, strict=True) if count},
        context=None if counter is None else counter.length,
        cut=0 if counter is None else int((rows["tokens"] > counter.length).sum()),
        sources=_sources(shards, measured) if captions else {},
        signals=signals,
        repeats=repeats,
        extremes=extremes,
        refusals=tuple(_refusals(shards, known, measured.bad, captions, batch)),
    )


def _sources(shards: ShardSet, measured: Measured) -> dict[str, tuple[float, int, int]]:
    """As `Summary.sources`."""
    policy = shards.captions
    if policy.is_single:
        return {}
    rows = zip(policy.sources, policy.shares, measured.sources.tolist(), strict=True)
    return {one.name: (share, has, count) for one, share, (has, count) in rows}


def _sizes(
    rows: Rows, index_N: NDArray[np.int64], counter: TokenCounter | None, captions: bool
) -> tuple[dict[str, dict[str, float]], dict[str, Histogram], dict[str, tuple[int, ...]]]:
    """(quantiles, histograms, extremes) of usable samples."""
    if not len(rows):
        return {}, {}, {}
    width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
    aspect = width / height
    # one after the other, as each takes eight bytes a sample
    values: dict[str, Callable[[], NDArray[Any]]] = {
        "width": lambda: width,
        "height": lambda: height,
        "shorter side": lambda: np.minimum(width, height),
        "width / height": lambda: aspect,
        "megapixels": lambda: width * height / 1e6,
        "kilobytes of the file": lambda: rows["bytes"] / 1e3,
    }
    edges: dict[str, tuple[float, ...]] = {"width / height": ASPECTS, "shorter side": SIDES}
    extremes = {"widest": _first(-aspect, index_N), "tallest": _first(aspect, index_N)}
    extremes |= {"smallest": _first(width * height, index_N), "largest": _first(-width * height, index_N)}
    if captions:
        values["characters"], edges["characters"] = lambda: rows["characters"], CHARACTERS
        extremes["longest"] = _first(-rows["characters"].astype(np.int64), index_N)
        extremes["shortest"] = _first(rows["characters"], index_N)
    if counter is not None:
        values["tokens"] = lambda: rows["tokens"]
        edges["tokens"] = tuple(sorted({*range(8, counter.length, max(8, counter.length // 10 // 8 * 8)), counter.length + 1}))
    histograms = {name: Histogram.of(values[name](), of) for name, of in edges.items()}
    return {name: _quantiles(of()) for name, of in values.items()}, histograms, extremes


def caption_at(shards: ShardSet, index: int) -> str:
    """The caption by which a usable sample is known, read once more, without the white space around it.

    Raises BadSample where it can no longer be read.
    """
    captions = shards.captions.read(shards.read(index, shards.captions.needs).members)
    return captions.texts[chosen(shards.captions, captions, index)].strip()


def _refusals(shards: ShardSet, known: BadCounter, bad: BadCounter, captions: bool, batch: int | None) -> list[str]:
    """By the rules of `ShardSet.open`, of `Order` and of a run's own counter, in the order in which a run would meet them."""
    found = []
    data = shards.data
    if known.total >= known.seen:
        found.append(f"none of the {len(shards)} samples has {'both an image and a caption' if captions else 'an image'}")
    elif captions and not shards.captions.is_single:
        try:
            survey(shards)
        except ValueError as error:
            found.append(str(error))
    for counter, key in ((known, "by the indexes"), (bad, "by reading")):
        try:
            counter.check(data.max_bad_fraction, at_least=1, key=key)
        except ValueError as error:
            found.append(str(error))
    if batch is not None:
        try:
            order_of_pairs(len(shards), shards.sources, batch, 0, data.block, data.window)
        except ValueError as error:
            found.append(str(error))
    return found


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    """Values that are there, none between two."""
    found = np.quantile(values, list(QUANTILES.values()), method="lower")
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def _first(values: NDArray[Any], index_N: NDArray[np.int64], most: int = 4) -> tuple[int, ...]:
    """The samples with the smallest values, in order; of equal ones the first."""
    near = np.argpartition(values, min(most, len(values)) - 1)[:most] if len(values) else np.zeros(0, np.int64)
    # of all that are as small as the last of these, as a partition chooses among equal ones at will
    near = np.flatnonzero(values <= values[near].max()) if len(near) else near
    return tuple(index_N[near[np.argsort(values[near], kind="stable")][:most]].tolist())
