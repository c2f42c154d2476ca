"""What spans several ranks: collectives, agreement on what is computed, gathering with a gradient, passes over the columns of all ranks.

Sums and merges run in rank order, so runs repeat bitwise.

Legend: B rows of this rank, N = B * W rows of all ranks, M columns of a block, D width, W ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

# torch 2.14 renamed both; the old names warn there, the new ones are missing before. Drop the fallback when torch >= 2.14 is required.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks(NamedTuple):
    """This process's rank in its group, and the number of ranks. A single rank needs no group and starts no collective."""

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
        """(B, ...) -> (N, ...), the ranks' rows in rank order, without a gradient."""
        if self.world == 1:
            return local_BD
        gathered_ND = local_BD.new_empty((self.world * local_BD.shape[0], *local_BD.shape[1:]))
        _all_gather(gathered_ND, local_BD.detach().contiguous(), group=self.group)
        return gathered_ND

    def reduce_scatter(self, partial_ND: Tensor) -> Tensor:
        """(N, D) partial sums on every rank -> (B, D), the sum over ranks of this rank's rows."""
        if self.world == 1:
            return partial_ND
        sum_BD = partial_ND.new_empty((partial_ND.shape[0] // self.world, *partial_ND.shape[1:]))
        _reduce_scatter(sum_BD, partial_ND.contiguous(), group=self.group)
        return sum_BD

    def shift(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[dist.Work]]:
        """Sends contiguous `tensors` to the next rank and receives as many from the previous one, in one batch of messages.

        Returns the receive buffers and the works to wait for. Until then no tensor or buffer may be written, read or, on CUDA, freed.
        """
        if not tensors:
            return (), []
        assert self.group is not None, "a single rank sends no messages"
        following, previous = (dist.get_global_rank(self.group, (self.rank + step) % self.world) for step in (1, -1))
        buffers = tuple(torch.empty_like(tensor) for tensor in tensors)
        messages = [dist.P2POp(dist.isend, tensor, following, self.group) for tensor in tensors]
        messages += [dist.P2POp(dist.irecv, buffer, previous, self.group) for buffer in buffers]
        return buffers, dist.batch_isend_irecv(messages)

    def gather_integers(self, integers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Every rank's integers, on the host. Waits for no device where the group has a backend for the CPU.

        `init_process_group("cpu:gloo,cuda:nccl")` has one; with NCCL alone each call waits for the device once.
        """
        if self.world == 1:
            return [list(integers)]
        has_cpu_backend = "cpu:" in dist.get_backend_config(self.group)
        local_1K = torch.tensor([list(integers)], dtype=torch.int64, device="cpu" if has_cpu_backend else device)
        table: list[list[int]] = self.gather(local_1K).tolist()
        return table


Facts = Mapping[str, Any]
"""What must be equal on all ranks, by the name that error messages use. Values are compared by their repr."""


def agree(check: Callable[[], Facts], ranks: Ranks, device: torch.device) -> Facts:
    """The facts that `check` returns. Raises on every rank where `check` raises on any of them, or where its facts differ between them.

    A rank that raised alone would leave the others waiting in the next collective; ranks that compute different things enter different
    collectives, which ends in a hang or an abort. Every rank must call this. It costs one small exchange, and a second one, of the values
    that the message shows, where something differs. Raises what `check` raised on the rank itself, and ValueError on the others.
    """
    facts: Facts = {}
    fault: Exception | None = None
    try:
        facts = check()
    except Exception as error:
        fault = error
    if ranks.world > 1:
        values = {name: repr(value) for name, value in facts.items()}
        table = ranks.gather_integers([int(fault is not None), _digest(sorted(values)), _digest(sorted(values.items()))], device)
        faulty = [rank for rank, (is_faulty, *_) in enumerate(table) if is_faulty]
        if fault is None and faulty:
            raise ValueError(f"rank {faulty[0]} was given faulty arguments or embeddings; its own error says what is wrong")
        if fault is None and len({names for _, names, _ in table}) > 1:
            raise ValueError("the ranks compute different losses: every rank must call the same one")
        if fault is None and len({digest for *_, digest in table}) > 1:
            raise ValueError(_difference(values, ranks, device))
    if fault is not None:
        raise fault
    return facts


def _digest(values: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=7).digest(), "big")


def _difference(values: Mapping[str, str], ranks: Ranks, device: torch.device) -> str:
    """The message: each fact that differs, with every rank's value. A collective; the names are equal on all ranks."""
    longest = max(max(len(value.encode()) for value in values.values()), 1)
    longest = max(row[0] for row in ranks.gather_integers([longest], device))
    differing = []
    for name, value in sorted(values.items()):
        table = ranks.gather_integers(list(value.encode().ljust(longest)), device)
        of_ranks = [bytes(row).decode().strip() for row in table]
        if len(set(of_ranks)) > 1:
            differing.append(f"{name}: " + ", ".join(f"{each} on rank {rank}" for rank, each in enumerate(of_ranks)))
    return "every rank must compute the same loss of as many pairs; these differ: " + "; ".join(differing)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_BD: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.rows = ranks, local_BD.shape[0]
        return ranks.gather(local_BD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        rows = slice(ctx.ranks.rank * ctx.rows, (ctx.ranks.rank + 1) * ctx.rows)
        return grad_ND[rows] * ctx.ranks.world, None


def gather_rows(local_BD: Tensor, ranks: Ranks) -> Tensor:
    """`gather_with_grad` where the ranks have agreed on the shape already."""
    gathered: Tensor = local_BD if ranks.world == 1 else _GatherRows.apply(local_BD, ranks)
    return gathered


def gather_with_grad(local: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """(B, ...) on each rank -> (N, ...) on every rank, N = B * world, the ranks' rows in rank order, with a gradient for `local`.

    With it a loss over the batch of all ranks is plain torch: gather each tensor, then compute on every rank the same loss of all N rows.

        image, text = gather_with_grad(image, group), gather_with_grad(text, group)
        loss = cross_entropy(scale * image @ text.T, torch.arange(len(image), device=image.device))

    The backward pass communicates nothing: since all ranks compute the same loss, a rank's slice of the gradient is complete. It is
    multiplied by `world`, so that the mean over ranks that data parallelism takes is the gradient of the loss. A loss that differs between
    ranks, such as one of a rank's own rows alone, would get a wrong gradient. There is no second derivative.

    group: None is this process alone: `local` itself is returned, even where torch.distributed runs. With a group every rank must call.
    Raises ValueError for a scalar; and on every rank where rows, the shape of a row or the dtype differ between ranks.
    """
    ranks = Ranks.of(group)

    def check() -> Facts:
        if not local.ndim:
            raise ValueError("rows are gathered, and a tensor of shape () has none: pass (B, ...)")
        return {"rows": len(local), "shape of a row": tuple(local.shape[1:]), "dtype": local.dtype}

    agree(check, ranks, local.device)
    return gather_rows(local, ranks)


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_BD: Tensor, ranks: Ranks, dtype: torch.dtype) -> Tensor:
        ctx.ranks, ctx.dtype = ranks, local_BD.dtype
        return ranks.gather(local_BD).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.reduce_scatter(grad_ND).to(ctx.dtype), None, None


class _AddParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        ctx.world = ranks.world
        return ranks.gather(part[None]).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.world, None


def gather_for_parts(local_BD: Tensor, ranks: Ranks, dtype: torch.dtype) -> Tensor:
    """(B, ...) -> (N, ...) in `dtype`, for a loss of which each rank computes a part of its own; `add_parts` makes the whole of them.

    Unlike with `gather_rows` the parts differ between ranks: the backward pass sums the gradients of all ranks, in `dtype`, and is a
    collective. What travels forward is in the dtype of `local_BD`. The ranks have agreed on the shape already.
    """
    gathered: Tensor = local_BD.to(dtype) if ranks.world == 1 else _GatherParts.apply(local_BD, ranks, dtype)
    return gathered


def add_parts(part: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks of each one's part, equal on all. Times `world` backward: the MEAN over ranks is then the sum's gradient.

    That holds for what a rank uses by itself, such as a scale, and for what was gathered by `gather_for_parts`.
    """
    total: Tensor = part if ranks.world == 1 else _AddParts.apply(part, ranks)
    return total


class Block(NamedTuple):
    """Columns that are here now. Column `first + m` of the matrix is row m of `tensors`, each (M, D)."""

    first: int
    tensors: tuple[Tensor, ...]
    grad: Tensor | None
    """(M, D') zeros, to which the caller adds its rows' part of the gradient of these columns; None where none is wanted."""

    def diagonal(self, first: int) -> int | None:
        """The place in this block of column `first` of the matrix, where the own rows' diagonal begins; None: it is in another block."""
        place = first - self.first
        return place if 0 <= place < len(self.tensors[0]) else None


class Sweep:
    """One pass of this rank's rows over the columns of all ranks: gathered at once, or block by block around a ring.

    Gathering holds every column on every rank: N x D embeddings and, in a backward pass, N x D gradients. The ring holds two blocks of
    B columns and three of gradients instead. Iterate once and to the end, on every rank; then `own_grad`, where gradients are wanted.

        sweep = Sweep((text_BD,), ranks, ring=True, grad_like=text_BD.new_empty(0, width))
        for block in sweep:
            block.grad.addmm_(slope_BM.T, left_BD)
        grad_BD = sweep.own_grad()

    tensors: (B, D) each, of as many rows on every rank. grad_like: a tensor of the gradients' width, dtype and device, or None.
    gathered: the attribute of an earlier sweep over the same tensors, which saves gathering again; empty for a ring.
    """

    def __init__(
        self, tensors: Sequence[Tensor], ranks: Ranks, *, ring: bool, grad_like: Tensor | None, gathered: tuple[Tensor, ...] = ()
    ) -> None:
        self._tensors = tuple(tensor.detach().contiguous() for tensor in tensors)
        self._ranks, self._ring, self._grad_like = ranks, ring and ranks.world > 1, grad_like
        self.gathered = gathered
        self._own_grad: Tensor | None = None

    def __iter__(self) -> Iterator[Block]:
        return self._around_the_ring() if self._ring else self._all_at_once()

    def own_grad(self) -> Tensor:
        """(B, D'): the gradient of this rank's own columns, summed over the rows of all ranks."""
        assert self._own_grad is not None, "own_grad() is for a finished pass with gradients"
        return self._own_grad

    def _zeros(self, columns: int) -> Tensor | None:
        return None if self._grad_like is None else self._grad_like.new_zeros((columns, *self._grad_like.shape[1:]))

    def _all_at_once(self) -> Iterator[Block]:
        self.gathered = self.gathered or tuple(self._ranks.gather(tensor) for tensor in self._tensors)
        grad = self._zeros(len(self.gathered[0]))
        yield Block(0, self.gathered, grad)
        if grad is not None:
            self._own_grad = self._ranks.reduce_scatter(grad)

    def _around_the_ring(self) -> Iterator[Block]:
        """The columns go to the next rank while they are in use; their gradient follows one hop later, and ends at the columns' owner.

        At hop h this rank has the columns of rank (rank - h) mod W. While the caller uses them, one batch of messages sends them on,
        together with the gradient of the columns of hop h - 1, and receives the next columns and the gradient of those of hop h so far.
        """
        columns, rows, world = self._tensors, len(self._tensors[0]), self._ranks.world
        finished: tuple[Tensor, ...] = ()
        for hop in range(world):
            outgoing = columns if hop + 1 < world else ()
            buffers, works = self._ranks.shift((*outgoing, *finished))
            grad = self._zeros(rows)
            yield Block((self._ranks.rank - hop) % world * rows, columns, grad)
            for work in works:
                work.wait()
            columns = buffers[: len(outgoing)]
            if grad is not None:
                finished = (grad if hop == 0 else grad.add_(buffers[-1]),)
        if finished:
            (self._own_grad,), works = self._ranks.shift(finished)
            for work in works:
                work.wait()
