"""The order of the samples: a pure function from the position, samples consumed over all ranks and epochs, to a sample's index.

The position is all that resuming needs, and any number of ranks and workers sees the same global batches. Every draw is a pure function of
(seed, purpose, place). Only `Philox.random_raw` is drawn from: its stream is the same in every numpy (NEP 19), `Generator.permutation`'s
may change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Purpose = Literal["blocks", "window", "replacement", "view", "caption", "mixture"]
_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)  # by place: new ones go to the end


@lru_cache(maxsize=64)
def _key(seed: int, purpose: Purpose) -> NDArray[np.uint64]:
    return np.asarray(np.random.SeedSequence((seed, _PURPOSES.index(purpose))).generate_state(2, np.uint64), dtype=np.uint64)


def raw(seed: int, purpose: Purpose, place: tuple[int, int], count: int) -> NDArray[np.uint64]:
    """`count` 64-bit draws of (seed, purpose, place); `place` is in the upper words of Philox's counter, so streams never meet."""
    counter = np.array([0, place[0], place[1], 0], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=_key(seed, purpose), counter=counter).random_raw(count), dtype=np.uint64)


def uniform(seed: int, purpose: Purpose, place: tuple[int, int], count: int) -> list[float]:
    """`count` floats in [0, 1) with 53 random bits each."""
    return [int(value >> np.uint64(11)) * 2.0**-53 for value in raw(seed, purpose, place, count)]


def permutation(seed: int, purpose: Purpose, place: tuple[int, int], count: int) -> NDArray[np.int64]:
    """A permutation of range(count): (count,)."""
    return np.argsort(raw(seed, purpose, place, count), kind="stable")


@dataclass(frozen=True)
class Order:
    """position -> sample index, a permutation in each epoch.

    1. The samples are cut into blocks of `block` consecutive ones, so that reads stay near each other on disk.
    2. The blocks are permuted, seeded by (seed, epoch).
    3. Groups of `window` blocks are mixed sample by sample, seeded by (seed, epoch, group).

    An epoch has samples // batch * batch positions; which samples are left over differs from epoch to epoch. Memory: one integer a block,
    and a few groups of block * window integers. Raises ValueError when there are fewer samples than one global batch.
    """

    samples: int
    batch: int
    seed: int
    block: int
    window: int

    def __post_init__(self) -> None:
        if self.samples < self.batch:
            raise ValueError(
                f"optim.batch = {self.batch} but the data has {self.samples} samples: one global batch needs at least as many; "
                f"lower optim.batch or add shards to data.train"
            )

    @property
    def epoch_length(self) -> int:
        return self.samples // self.batch * self.batch

    def __call__(self, position: int) -> int:
        return int(self.indices(position, 1)[0])

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Sample indices of the positions start .. start + count - 1: (count,) int64."""
        if start < 0:
            raise ValueError(f"position = {start}: positions start at 0")
        parts: list[NDArray[np.int64]] = []
        while count > 0:
            epoch, place = divmod(start, self.epoch_length)
            group, first = _group_of(self, epoch, place)
            samples = _lately(self).group(epoch, group)
            take = min(count, len(samples) - (place - first), self.epoch_length - place)
            parts.append(samples[place - first : place - first + take])
            start, count = start + take, count - take
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def epoch(self, position: int) -> int:
        """Which epoch a position is in, from 0."""
        return position // self.epoch_length

    def replacement(self, position: int, attempt: int) -> int:
        """The sample of the same epoch that replaces a bad one at `position`: a pure function of (seed, position, attempt)."""
        epoch_start = position // self.epoch_length * self.epoch_length
        draw = int(raw(self.seed, "replacement", (position, attempt), 1)[0])
        return self(epoch_start + draw % self.epoch_length)


class _Lately:
    """What an order has drawn lately: two epochs, the current one and, at its end, the next, and the groups that are read."""

    def __init__(self, order: Order) -> None:
        self.blocks = lru_cache(maxsize=2)(partial(_blocks, order))
        self.group = lru_cache(maxsize=4)(partial(_group, order))


# In the module, as an Order is pickled to the workers; one for each order, as those of a mixture's sources are read in turn.
@lru_cache(maxsize=256)
def _lately(order: Order) -> _Lately:
    return _Lately(order)


def _blocks(order: Order, epoch: int) -> tuple[NDArray[np.int64], int]:
    """The permuted blocks, (blocks,), and the place of the last block of the data, the only one that may be short."""
    blocks = permutation(order.seed, "blocks", (epoch, 0), -(-order.samples // order.block))
    return blocks, int(np.argmax(blocks))


def _group_of(order: Order, epoch: int, place: int) -> tuple[int, int]:
    """(group, its first place): those behind the short block's group begin earlier, by what that block lacks."""
    blocks, short = _lately(order).blocks(epoch)
    full = order.block * order.window
    deficit = len(blocks) * order.block - order.samples
    short_group = short // order.window
    if place < (short_group + 1) * full - deficit:
        group = min(place // full, short_group)
        return group, group * full
    group = (place + deficit) // full
    return group, group * full - deficit


def _group(order: Order, epoch: int, group: int) -> NDArray[np.int64]:
    """The mixed samples of one group: (block * window,) int64, less where the short or the last blocks are."""
    blocks = _lately(order).blocks(epoch)[0][group * order.window : (group + 1) * order.window]
    samples = (blocks[:, None] * order.block + np.arange(min(order.block, order.samples))).ravel()
    samples = samples[samples < order.samples]
    mixed = samples[permutation(order.seed, "window", (epoch, group), len(samples))]
    mixed.flags.writeable = False  # shared by all callers through the cache
    return mixed
