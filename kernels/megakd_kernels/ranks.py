"""The collectives of this package, and their order: everything is summed or merged in rank order, so runs repeat bitwise.

Legend: B local rows, N = B x world rows of all ranks, D width, W world.
"""

from __future__ import annotations

from collections.abc import Sequence
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
