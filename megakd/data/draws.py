"""Counter-based random numbers: every draw is a pure function of (seed, purpose, place), never of what was drawn before.

`Philox.random_raw` keeps its stream between numpy versions (NEP 19); `Generator.permutation` and its relatives may change.
A checkpoint that is resumed with another numpy must see the same samples, so only raw draws are used.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Purpose = Literal["blocks", "window", "replacement", "view"]
_PURPOSES: tuple[Purpose, ...] = ("blocks", "window", "replacement", "view")


@lru_cache(maxsize=64)
def _key(seed: int, purpose: Purpose) -> NDArray[np.uint64]:
    return np.asarray(np.random.SeedSequence((seed, _PURPOSES.index(purpose))).generate_state(2, np.uint64), dtype=np.uint64)


def raw(seed: int, purpose: Purpose, place: tuple[int, int], count: int) -> NDArray[np.uint64]:
    """`count` 64-bit draws that belong to (seed, purpose, place); other places have independent streams.

    `place` fills the upper words of Philox's 256-bit counter, so that 2**64 draws of one place never reach the next.
    """
    counter = np.array([0, place[0], place[1], 0], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=_key(seed, purpose), counter=counter).random_raw(count), dtype=np.uint64)


def uniform(seed: int, purpose: Purpose, place: tuple[int, int], count: int) -> list[float]:
    """`count` floats in [0, 1) with 53 random bits each."""
    return [int(value >> np.uint64(11)) * 2.0**-53 for value in raw(seed, purpose, place, count)]


def permutation(seed: int, purpose: Purpose, place: tuple[int, int], count: int) -> NDArray[np.int64]:
    """A permutation of range(count): (count,)."""
    return np.argsort(raw(seed, purpose, place, count), kind="stable")
