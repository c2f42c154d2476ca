"""What collectives put on the wire, for whoever predicts it.

Counted are the bytes that one rank sends, and as many come in, by the algorithms whose traffic is least (rings): of W ranks and a whole of
S bytes, (W - 1) / W of S in an all-gather or a reduce-scatter, twice that in an all-reduce. A tree sends the same of an all-reduce, in sum
over the ranks. DeepSpeed's comms logger prints messages instead: of an all-gather a rank's own part S / W, of the two others S.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wire:
    """Bytes that one rank sends, by kind of collective; sent: from neighbour to neighbour, around a ring of our own.

    calls: how many start, or times that columns go around; reductions: all-reduces alone, which do not go around.
    """

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0
    sent: int = 0
    calls: int = 0
    reductions: int = 0

    @property
    def bytes(self) -> int:
        return self.all_gather + self.reduce_scatter + self.all_reduce + self.sent

    def __add__(self, other: Wire) -> Wire:
        return Wire(*(mine + theirs for mine, theirs in zip(self._fields(), other._fields(), strict=True)))

    def times(self, count: int) -> Wire:
        return Wire(*(count * one for one in self._fields()))

    def _fields(self) -> tuple[int, ...]:
        return self.all_gather, self.reduce_scatter, self.all_reduce, self.sent, self.calls, self.reductions


def gathered(size: float, ranks: int, calls: int = 1) -> Wire:
    """size: bytes of the whole, of which each rank has a part."""
    return Wire(all_gather=round((ranks - 1) / ranks * size), calls=calls if ranks > 1 else 0)


def scattered(size: float, ranks: int, calls: int = 1) -> Wire:
    """size: bytes of what each rank adds to the sum."""
    return Wire(reduce_scatter=round((ranks - 1) / ranks * size), calls=calls if ranks > 1 else 0)


def reduced(size: float, ranks: int, calls: int = 1) -> Wire:
    """size: bytes of what each rank adds to the sum, all of which comes back."""
    return Wire(all_reduce=round(2 * (ranks - 1) / ranks * size), reductions=calls if ranks > 1 else 0)
