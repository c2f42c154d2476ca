"""One pass of this rank's rows over the columns of all ranks: gathered at once, or block by block around a ring.

Gathering holds every column on every rank: N x D embeddings and, in a backward pass, N x D gradients. The ring holds two blocks
of B columns and three of gradients instead. Both add in an order that depends on the ranks alone, so runs repeat bitwise.

Legend: B local rows, N columns (rows of all ranks), M columns of a block, D width, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from megakd_kernels.ranks import Ranks


class Block(NamedTuple):
    """Columns that are here now. Column `first + m` of the matrix is row m of `tensors`, each (M, D)."""

    first: int
    tensors: tuple[Tensor, ...]
    share: Tensor | None
    """(M, D') zeros, to which the caller adds what this rank's rows give to the gradient of these columns; None if not asked for."""


class Sweep:
    """Iterate once; then `home` where shares were asked for.

        sweep = Sweep((text_BD,), ranks, ring=True, share=text_BD.new_empty(0, width))
        for block in sweep:
            block.share.addmm_(slope_BM.T, left_BD)
        gradient_BD = sweep.home()

    tensors: (B, D) each, as long on every rank. share: a tensor that shows the shares' width, dtype and device, or None.
    gathered: what an earlier sweep over the same tensors left in `gathered`: saves gathering again; empty for a ring.
    Every rank must iterate to the end.
    """

    def __init__(
        self, tensors: Sequence[Tensor], ranks: Ranks, *, ring: bool, share: Tensor | None, gathered: tuple[Tensor, ...] = ()
    ) -> None:
        self._tensors = tuple(tensor.detach().contiguous() for tensor in tensors)
        self._ranks, self._ring, self._like = ranks, ring and ranks.world > 1, share
        self.gathered = gathered
        self._home: Tensor | None = None

    def __iter__(self) -> Iterator[Block]:
        return self._around() if self._ring else self._at_once()

    def home(self) -> Tensor:
        """(B, D'): the shares of all ranks in this rank's own columns, summed."""
        assert self._home is not None, "home() is for a finished pass with shares"
        return self._home

    def _zeros(self, columns: int) -> Tensor | None:
        return None if self._like is None else self._like.new_zeros((columns, *self._like.shape[1:]))

    def _at_once(self) -> Iterator[Block]:
        self.gathered = self.gathered or tuple(self._ranks.gather(tensor) for tensor in self._tensors)
        share = self._zeros(len(self.gathered[0]))
        yield Block(0, self.gathered, share)
        if share is not None:
            self._home = self._ranks.sum_to_owner(share)

    def _around(self) -> Iterator[Block]:
        """Columns travel to the next rank while they are worked on; the sum of their shares follows one hop behind, back to its owner.

        At hop h this rank holds the columns of rank (rank - h) mod W. What it added to those of hop h - 1 leaves, and what the rank
        before added to those of hop h arrives, during the work of hop h: one batch of messages a hop, waited for after the work.
        """
        here, rows, world = self._tensors, len(self._tensors[0]), self._ranks.world
        finished: tuple[Tensor, ...] = ()
        for hop in range(world):
            columns = here if hop + 1 < world else ()
            arriving, works = self._ranks.pass_on((*columns, *finished))
            share = self._zeros(rows)
            yield Block((self._ranks.rank - hop) % world * rows, here, share)
            for work in works:
                work.wait()
            here = arriving[: len(columns)]
            if share is not None:
                finished = (share if hop == 0 else share.add_(arriving[-1]),)
        if finished:
            (self._home,), works = self._ranks.pass_on(finished)
            for work in works:
                work.wait()
