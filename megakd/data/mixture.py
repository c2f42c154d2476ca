"""The order of a mixture: every global batch has its share of each source, and each source its own shuffle and its own epochs.

1. A batch's rows are given to the sources in proportion to their weights by systematic sampling: of L rows at the points (j + u) / L, those
   between two cumulative shares are one source's. So a batch has the share of each, rounded up or down, never a draw's luck.
2. u runs through the batches as the van der Corput sequence does, each next number as far from the earlier ones as can be. So what was
   rounded adds up to the share over any number of batches, and how many rows a source had before a batch is a sum of few terms.
3. Within a batch the rows are permuted, seeded by (seed, batch): no rank and no place of it has always the same source.
4. The n-th row of a source is position n of that source's own `Order`, seeded by (seed, its name); where it runs out, its next epoch
   begins.

Positions, source and sample are pure functions of each other, as in `Order`: for any ranks and workers, and wherever a run goes on.
Systematic sampling: Kitagawa 1996. Van der Corput's sequence: the bits of 0, 1, 2, ... reversed behind the point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megakd.data.sampler import Order, permutation

_BITS = 32  # of u, after which it begins anew: shares are exact to 2^-32 rows of a batch
_ONE = 1 << _BITS


@dataclass(frozen=True)
class Source:
    """weight: of its rows beside the others'; 0 draws nothing from it."""

    name: str
    samples: int
    weight: float


@dataclass(frozen=True)
class MixtureOrder:
    """position -> sample index, the samples of all sources numbered one source after the other. Used as `Order` is.

    Memory: that of an `Order` for each source, and two integers for each row of a batch. Raises ValueError where no source has a weight.
    """

    sources: tuple[Source, ...]
    batch: int
    seed: int
    block: int
    window: int

    def __post_init__(self) -> None:
        if not any(source.weight > 0 and source.samples for source in self.sources):
            raise ValueError(f"the weights of {', '.join(source.name for source in self.sources)} sum to 0: give one of them a weight")

    @property
    def samples(self) -> int:
        return sum(source.samples for source in self.sources)

    @property
    def shares(self) -> list[float]:
        """Of each source in the rows."""
        total = sum(source.weight for source in self.sources)
        return [source.weight / total for source in self.sources]

    def __call__(self, position: int) -> int:
        return int(self.indices(position, 1)[0])

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Sample indices of the positions start .. start + count - 1: (count,) int64."""
        if start < 0:
            raise ValueError(f"position = {start}: positions start at 0")
        parts: list[NDArray[np.int64]] = []
        while count > 0:
            number, row = divmod(start, self.batch)
            take = min(count, self.batch - row)
            source_R, place_R = (column[row : row + take] for column in _rows(self, number))
            found = np.empty(take, np.int64)
            for source in np.unique(source_R).tolist():
                mine = np.flatnonzero(source_R == source)  # whose places follow each other
                found[mine] = _orders(self)[source].indices(int(place_R[mine[0]]), len(mine)) + _starts(self)[source]
            parts.append(found)
            start, count = start + take, count - take
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def replacement(self, position: int, attempt: int) -> int:
        """The sample of the same source and epoch that replaces a bad one at `position`: a pure function of (seed, position, attempt)."""
        source, place = self._row(position)
        return _starts(self)[source] + _orders(self)[source].replacement(place, attempt)

    def epoch(self, position: int) -> int:
        """Which epoch of its own the source of this position is in, from 0."""
        source, place = self._row(position)
        return _orders(self)[source].epoch(place)

    def counts(self, batches: int) -> list[int]:
        """How many rows of so many first batches are of each source."""
        ends = [_before(bound, batches) for bound in _bounds(self)]
        return [end - first for first, end in zip([0, *ends], ends, strict=False)]

    def sources_of(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,): the number of the source of each sample."""
        return np.searchsorted(_starts(self), index_B, side="right") - 1

    def source_of(self, index: int) -> str:
        """The name of a sample's source."""
        return self.sources[int(self.sources_of(np.array(index)))].name

    def most_rows(self) -> list[int]:
        """Of each source in any one batch."""
        widths = np.diff([0, *_bounds(self)]).tolist()
        return [-(-width // _ONE) for width in widths]

    def _row(self, position: int) -> tuple[int, int]:
        """(source, place in its own order)"""
        number, row = divmod(position, self.batch)
        source_L, place_L = _rows(self, number)
        return int(source_L[row]), int(place_L[row])


AnyOrder = Order | MixtureOrder


# In the module, as an order is pickled to the workers.
@lru_cache(maxsize=64)
def _orders(order: MixtureOrder) -> list[Order]:
    """Of one row a batch, so that an epoch has every sample."""
    return [Order(max(1, one.samples), 1, _own_seed(order.seed, one.name), order.block, order.window) for one in order.sources]


def _own_seed(seed: int, name: str) -> int:
    """By the name, so that another source beside it leaves a source's shuffle as it is."""
    return int(np.random.SeedSequence((seed, *name.encode())).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=64)
def _starts(order: MixtureOrder) -> list[int]:
    """The first sample of each source."""
    return [sum(source.samples for source in order.sources[:number]) for number in range(len(order.sources))]


@lru_cache(maxsize=64)
def _bounds(order: MixtureOrder) -> list[int]:
    """Where in a batch each source ends, in 2^-32 rows; the last one at its end."""
    weights = [Fraction(source.weight) for source in order.sources]
    total = sum(weights)
    return [int(sum(weights[: number + 1]) / total * order.batch * _ONE) for number in range(len(weights))]


def _reversed(number: int) -> int:
    """The lowest 32 bits, the last one first."""
    return int(f"{number % _ONE:0{_BITS}b}"[::-1], 2)


def _before(bound: int, batches: int) -> int:
    """Rows before `bound` in so many first batches: its whole rows in each, and one more where u is below what is left."""
    whole, rest = divmod(bound, _ONE)
    periods, last = divmod(batches, _ONE)
    count, fixed = batches * whole + periods * rest, 0
    for bit in reversed(range(_BITS)):
        if last >> bit & 1:
            # numbers as `last` above this bit and with 0 in it: reversed, they are `fixed` and 2^bit steps from there on
            step = 1 << (_BITS - bit)
            count += min(max(-((fixed - rest) // step), 0), 1 << bit)
            fixed |= 1 << (_BITS - 1 - bit)
    return count


@lru_cache(maxsize=8)
def _rows(order: MixtureOrder, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of a batch, (L,) each: the source of each row, and the row's place in that source's own order."""
    offset, bounds = _reversed(number), _bounds(order)
    ends = [bound // _ONE + (offset < bound % _ONE) for bound in bounds]
    first = order.counts(number)
    source_L = np.repeat(np.arange(len(bounds)), np.diff([0, *ends]))[permutation(order.seed, "mixture", (number, 0), order.batch)]
    place_L = np.empty(order.batch, np.int64)
    for source in range(len(bounds)):
        mine = np.flatnonzero(source_L == source)
        place_L[mine] = first[source] + np.arange(len(mine))
    for column in (source_L, place_L):
        column.flags.writeable = False  # shared by all callers through the cache
    return source_L, place_L


def order_of_pairs(samples: int, sources: Sequence[Source], batch: int, seed: int, block: int, window: int) -> AnyOrder:
    """The order of `data.train`: that of a mixture where it names its sources.

    Raises ValueError for fewer samples than a batch has rows of them: a pair would be there twice in a batch, as its own negative.
    """
    if not sources:
        return Order(samples, batch, seed, block, window)
    order = MixtureOrder(tuple(sources), batch, seed, block, window)
    for source, rows, share in zip(sources, order.most_rows(), order.shares, strict=True):
        if rows > source.samples:
            raise ValueError(
                f"data.train.{source.name}: {source.samples} samples, and by its weight, {share:.4g} of all, optim.batch = {batch} takes "
                f"{rows} of them at once, some of them twice: lower its weight or optim.batch, or add shards to it"
            )
    return order


def outline(order: AnyOrder, key: str, items: str, batches: int) -> list[str]:
    """A line for each source of a mixture: its share, its size, and how often a run of so many batches goes through it."""
    if not isinstance(order, MixtureOrder):
        return []
    lines = []
    for source, share, rows in zip(order.sources, order.shares, order.counts(batches), strict=True):
        line = f"{key}.{source.name}: {share:.2%} of each batch, {source.samples:,} {items}"
        if not source.weight:
            line += ", none of which is drawn"
        elif source.samples:
            epochs = rows / source.samples
            line += f", {epochs:.3g} epochs in this run" + (": each of them is seen about that often" if epochs > 1 else "")
        lines.append(line)
    return lines
