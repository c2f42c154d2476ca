"""The matrices of which an int8 teacher was made, read again one at a time: the whole model in 16 bits is never anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.models.int8.linear import Int8Linear
from megakd.runtime import collectives
from megakd.runtime.launch import World


class Readable(Protocol):
    def read(self, name: str) -> Tensor: ...


class Originals:
    """Of every int8 layer the original matrix. Every rank calls `read`, of the same layer; the first one alone reads."""

    def __init__(
        self, names: Mapping[Int8Linear, str], reopen: Callable[[], Readable], world: World, opened: Readable | None = None
    ) -> None:
        """names: of the layers' matrices in the weights that `reopen` gives; it is called on the first rank, and not before a read.

        opened: what it would give, where that is there already and dear to make again: `close` lets go of it.
        """
        self.names, self.world = dict(names), world
        self._reopen = reopen
        self._opened = opened

    def read(self, layer: Int8Linear) -> Tensor:
        """(O, I) in the file's type, on the device. Raises ValueError or OSError on every rank when it cannot be read."""
        found: list[Tensor] = []

        def look() -> tuple[torch.dtype, tuple[int, ...]]:
            if self._opened is None:
                self._opened = self._reopen()
            found.append(self._opened.read(self.names[layer]).flatten(1).contiguous())
            return found[0].dtype, tuple(found[0].shape)

        dtype, shape = collectives.by_main(look, self.world)
        weight_OI = found[0].to(self.world.device) if found else torch.empty(shape, dtype=dtype, device=self.world.device)
        if self.world.size > 1:
            dist.broadcast(weight_OI.view(-1).view(torch.uint8), 0)
        return weight_OI

    def close(self) -> None:
        """Let go of what was opened: random weights lie in memory."""
        self._opened = None
