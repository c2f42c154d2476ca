"""The collectives of this package, and one pass of this rank's rows over the columns of all ranks.

Everything is summed or merged in rank order, so runs repeat bitwise. Columns are gathered at once, or come block by block around a ring.
Gathering holds every column on every rank: N x D embeddings and, in a backward pass, N x D gradients. The ring holds two blocks
of B columns and three of gradients instead.

Legend: B local rows, N columns (B x W rows of all ranks), M columns of a block, D width, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.14 renamed both; the old names warn there, the new ones are missing before. Drop the fallback when torch >= 2.14 is required.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks(NamedTuple):
    """Where this process stands in its group. world 1 needs no group and starts no collective."""

    group: ProcessGroup | None
    rank: int
    world: int

    @classmethod
    def of(cls, group: ProcessGroup | None) -> Ranks:
        if group is None or dist.get_world_size(group) == 1:
            return cls(None, 0, 1)
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("this process is not a member of the process group it was given")
        return cls(group, rank, dist.get_world_size(group))

    def gather(self, local_BD: Tensor) -> Tensor:
        """(B, ...) -> (N, ...), the ranks' rows in rank order. Carries no gradient: the callers define their own."""
        if self.world == 1:
            return local_BD
        whole_ND = local_BD.new_empty((self.world * local_BD.shape[0], *local_BD.shape[1:]))
        _all_gather(whole_ND, local_BD.detach().contiguous(), group=self.group)
        return whole_ND

    def sum_to_owner(self, partial_ND: Tensor) -> Tensor:
        """(N, D) partial sums on every rank -> (B, D), the sum over ranks of the rows that this rank owns."""
        if self.world == 1:
            return partial_ND
        own_BD = partial_ND.new_empty((partial_ND.shape[0] // self.world, *partial_ND.shape[1:]))
        _reduce_scatter(own_BD, partial_ND.contiguous(), group=self.group)
        return own_BD

    def pass_on(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[dist.Work]]:
        """Sends contiguous `tensors` to the next rank and receives the like from the one before, in one batch of messages.

        Returns the buffers and the works to wait for; until then neither side may be touched or, on CUDA, let go.
        """
        if not tensors:
            return (), []
        peers = [dist.get_global_rank(self._member(), (self.rank + step) % self.world) for step in (1, -1)]
        arriving = tuple(torch.empty_like(tensor) for tensor in tensors)
        moves = [dist.P2POp(dist.isend, tensor, peers[0], self.group) for tensor in tensors]
        moves += [dist.P2POp(dist.irecv, buffer, peers[1], self.group) for buffer in arriving]
        return arriving, dist.batch_isend_irecv(moves)

    def _member(self) -> ProcessGroup:
        assert self.group is not None, "a world of one sends no messages"
        return self.group

    def exchange(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Every rank's numbers, on the host. Free of a device wait where the group also speaks for the CPU.

        `init_process_group("cpu:gloo,cuda:nccl")` does; an NCCL-only group costs one device wait a call.
        """
        if self.world == 1:
            return [list(numbers)]
        speaks_cpu = "cpu:" in dist.get_backend_config(self.group)
        local_1K = torch.tensor([list(numbers)], dtype=torch.int64, device="cpu" if speaks_cpu else device)
        table: list[list[int]] = self.gather(local_1K).tolist()
        return table


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
