"""A stop signal in the midst of work without steps: an evaluation, which may take longer than a scheduler waits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch

from megakd.runtime import collectives
from megakd.runtime.launch import World
from megakd.runtime.signals import Interrupted, StopRequest

T = TypeVar("T")
_EVERY = 4  # batches: to ask at each would make every rank wait for the slowest at each


class Interruptions:
    """Asks, where all ranks come by, whether a signal has come to any of them. stop None: none is looked for."""

    def __init__(self, world: World, stop: StopRequest | None = None) -> None:
        self._world, self._stop = world, stop

    def check(self) -> None:
        """A collective. Raises Interrupted on every rank once a signal has come to one."""
        if self._stop is None:
            return
        # on the CPU, as collectives.barrier
        if any(collectives.start_sum(torch.tensor([float(bool(self._stop))]), self._world).read()):
            raise Interrupted

    def between(self, batches: Iterator[T], rows: int, size: int) -> Iterator[T]:
        """This rank's `batches` of `size`, of a set of `rows` that is split evenly over the ranks; `check` before each few of them.

        Ranks may have one batch less than others, or none, and ask as often as those.
        """
        most = -(-rows // self._world.size)
        for number in range(-(-most // size)):
            if number % _EVERY == 0:
                self.check()
            if (batch := next(batches, None)) is not None:
                yield batch
        assert next(batches, None) is None, "a rank has more batches than its share"
