"""Samples that cannot be used: why, how many, when that is too many, and a log that says so without flooding."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

Item = TypeVar("Item")
Row = TypeVar("Row")

Reason = Literal[
    "missing_image",
    "missing_caption",
    "empty_caption",
    "corrupt_image",
    "too_large",
    "too_thin",
    "bad_pixels",
    "bad_text",
    "too_long",
    "truncated_tar",
    "unused_members",
    "read_error",
    "bad_json",
    "missing_embedding",
    "bad_embedding",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
OF_CAPTIONS: tuple[Reason, ...] = ("missing_caption", "empty_caption")  # those that the indexes of shards know
# truncated_tar: lost in a damaged tar. unused_members: a sample's members are there and none can be used.

log = logging.getLogger("megakd.data")


class BadSample(Exception):
    """One sample cannot be used. `where` is 'shard: key', filled in by the shards."""

    def __init__(self, reason: Reason, detail: str, where: str = "") -> None:
        super().__init__(reason, detail, where)
        self.reason, self.detail, self.where = reason, detail, where

    def __str__(self) -> str:
        return f"{self.where} ({self.detail})" if self.where else self.detail


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Add the place to a BadSample that is raised inside."""
    try:
        yield
    except BadSample as bad:
        raise BadSample(bad.reason, bad.detail, where) from bad


@dataclass
class BadCounter:
    """Bad samples by reason among `seen` samples tried, with one example a reason. by_source: the same of each source of a mixture."""

    seen: int = 0
    counts: dict[Reason, int] = field(default_factory=dict)
    examples: dict[Reason, str] = field(default_factory=dict)
    by_source: dict[str, BadCounter] = field(default_factory=dict)

    def add(self, reason: Reason, example: str, count: int = 1) -> None:
        """Counts bad samples; whoever tries a sample, good or bad, adds it to `seen`."""
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples.setdefault(reason, example)

    def merge(self, other: BadCounter) -> None:
        self.seen += other.seen
        for reason, count in other.counts.items():
            self.add(reason, other.examples.get(reason, ""), count)
        for name, counter in other.by_source.items():
            self.by_source.setdefault(name, BadCounter()).merge(counter)

    def without(self, *reasons: Reason) -> BadCounter:
        """Where what they say makes no sample unusable."""
        counts = {reason: count for reason, count in self.counts.items() if reason not in reasons}
        examples = {reason: example for reason, example in self.examples.items() if reason in counts}
        by_source = {name: counter.without(*reasons) for name, counter in self.by_source.items()}
        return BadCounter(self.seen, counts, examples, by_source)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def fraction(self) -> float:
        return self.total / self.seen if self.seen else 0.0

    @property
    def example(self) -> str | None:
        """'reason: shard: key (detail)' of the most frequent reason that has one."""
        reason = max((name for name in self.counts if self.examples.get(name)), key=lambda name: self.counts[name], default=None)
        return None if reason is None else f"{reason}: {self.examples[reason]}"

    def to_list(self) -> list[int]:
        """[seen, one count for each of REASONS], then that of each source: integers of fixed length and order, to be summed over ranks."""
        own = [self.seen, *(self.counts.get(reason, 0) for reason in REASONS)]
        return [*own, *(value for counter in self.by_source.values() for value in counter.to_list())]

    @classmethod
    def from_list(cls, values: Sequence[int], here: BadCounter) -> BadCounter:
        """The inverse of `to_list`, with the sources and examples of this rank's counter."""
        length = 1 + len(REASONS)
        assert len(values) == length * (1 + len(here.by_source)), f"{len(values)} values for {len(REASONS)} reasons"
        counts = {reason: int(count) for reason, count in zip(REASONS, values[1:length], strict=True) if count}
        of_sources = (values[start : start + length] for start in range(length, len(values), length))
        by_source = {name: cls.from_list(part, one) for (name, one), part in zip(here.by_source.items(), of_sources, strict=True)}
        return cls(int(values[0]), counts, dict(here.examples), by_source)

    def check(self, max_bad_fraction: float, at_least: int, what: str = "samples", key: str = "") -> None:
        """Raises ValueError when `at_least` were seen and more than `max_bad_fraction` are bad. It begins with `key`, of the recipe."""
        if self.seen < at_least or self.fraction <= max_bad_fraction:
            return
        length = self.counts.get("too_long", 0) * 2 > self.total
        raise ValueError(
            f"{key and f'{key}: '}{self.total} of {self.seen} {what} are unusable ({self.fraction:.2%}), more than data.max_bad_fraction = "
            f"{max_bad_fraction}: {self.by_reason()}{self._worst_sources()}. Example: {self.example or 'on another rank'}. "
            f"{'Raise answers.max_length' if length else 'Repair the files'}, or raise data.max_bad_fraction"
        )

    def by_reason(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.counts.items(), key=lambda item: -item[1]))

    def _worst_sources(self) -> str:
        """Of a mixture, which sources the bad ones are of."""
        worst = sorted((item for item in self.by_source.items() if item[1].total), key=lambda item: -item[1].total)
        told = ", ".join(f"{name} {counter.total} of {counter.seen}" for name, counter in worst[:4])
        return f" (by source: {told}{f' and {len(worst) - 4} more' if len(worst) > 4 else ''})" if worst else ""


class Usable(NamedTuple, Generic[Row]):
    """What could be used of some items, and what could not: index_of_row[r] is the item of rows[r], unusable holds the others."""

    index_of_row: list[int]
    rows: list[Row]
    unusable: list[tuple[int, BadSample]]
    bad: BadCounter


def usable(indices: Sequence[int], items: Iterable[Item | BadSample], to_row: Callable[[int, Item], Row]) -> Usable[Row]:
    """A row of each item, by to_row(index, item), and without those that raise BadSample or are one."""
    made: Usable[Row] = Usable([], [], [], BadCounter(seen=len(indices)))
    for index, item in zip(indices, items, strict=True):
        try:
            if isinstance(item, BadSample):
                raise item
            made.rows.append(to_row(index, item))
            made.index_of_row.append(index)
        except BadSample as error:
            made.bad.add(error.reason, str(error))
            made.unusable.append((index, error))
    return made


class BadLog:
    """Logs the first few bad samples of each reason, then at most a line a reason in `seconds`, with the count since."""

    def __init__(self, first: int = 3, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._first, self._seconds, self._clock = first, seconds, clock
        self._lines: dict[Reason, int] = {}
        self._last: dict[Reason, float] = {}
        self._unwritten = BadCounter()

    def report(self, bad: BadCounter) -> None:
        for reason, count in bad.counts.items():
            self._unwritten.add(reason, bad.examples.get(reason, ""), count)
            if self._lines.get(reason, 0) < self._first or self._clock() - self._last[reason] >= self._seconds:
                self._write(reason, bad.examples.get(reason, ""))

    def close(self) -> None:
        """Log what was counted since the last line of each reason."""
        for reason in list(self._unwritten.counts):
            self._write(reason, self._unwritten.examples[reason])

    def _write(self, reason: Reason, example: str) -> None:
        count = self._unwritten.counts.pop(reason)
        del self._unwritten.examples[reason]
        log.warning("bad sample, %s: %s%s", reason, example, f" and {count - 1} more" if count > 1 else "")
        self._lines[reason], self._last[reason] = self._lines.get(reason, 0) + 1, self._clock()
