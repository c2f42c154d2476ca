"""A stop signal in the midst of work without steps: an evaluation, which may take longer than a scheduler waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch

from megakd.runtime import collectives
from megakd.runtime.exits import Interrupted, StopRequest
from megakd.runtime.launch import World

T = TypeVar("T")
_EVERY = 4  # batches: to ask at each would make every rank wait for the slowest at each


class StopPoller:
    """Asks, where all ranks come by, whether a signal has come to any of them. stop None: none is looked for.

    An error of one rank's batches waits for the same places: every rank raises it there, and none is left in a collective.
    """

    def __init__(self, world: World, stop: StopRequest | None = None) -> None:
        self._world, self._stop = world, stop
        self._failure: Exception | None = None

    def check(self) -> None:
        """A collective. Raises Interrupted on every rank once a signal has come to one, and the error that a rank met with."""
        # on the CPU, as collectives.barrier
        flags = torch.tensor([float(bool(self._stop)), float(self._failure is not None)])
        stopped, failed = collectives.start_sum(flags, self._world).read()
        if failed:
            mine, self._failure = self._failure, None
            raise next(error for error in (mine, *collectives.everyones(mine, self._world)) if error is not None)
        if stopped:
            raise Interrupted

    def between(self, batches: Iterator[T], rows: int, size: int) -> Iterator[T]:
        """This rank's `batches` of `size`, of a set of `rows` that is split evenly over the ranks; `check` before each few of them.

        Ranks may have one batch less than others, or none, and ask as often as those. Raises what `check` does.
        """
        most = -(-rows // self._world.size)
        for number in range(-(-most // size)):
            if number % _EVERY == 0:
                self.check()
            if (batch := self._next(batches)) is not None:
                yield batch
        self.check()
        assert next(batches, None) is None, "a rank has more batches than its share"

    def _next(self, batches: Iterator[T]) -> T | None:
        if self._failure is not None:
            return None
        try:
            return next(batches, None)
        except (ValueError, OSError) as error:
            self._failure = error
            return None
