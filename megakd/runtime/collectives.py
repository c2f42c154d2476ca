"""The few collectives the program makes outside DeepSpeed and the loss kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.runtime import failures
from megakd.runtime.exits import LossNotFinite
from megakd.runtime.launch import World

T = TypeVar("T")


class Pending:
    """A sum over ranks on its way to the host; `read` waits for it alone, not for work queued after it."""

    def __init__(self, summed: Tensor) -> None:
        self._event = None
        if summed.is_cuda:
            self._host = torch.empty(summed.shape, dtype=summed.dtype, pin_memory=True)
            self._host.copy_(summed, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = summed

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()  # type: ignore[no-any-return]


def start_sum(values: Tensor, world: World) -> Pending:
    """Sum a small vector over all ranks without waiting for the device. Every rank calls it."""
    if world.size > 1:
        dist.all_reduce(values)
    return Pending(values)


def barrier(world: World) -> None:
    """Wait for every rank, by a gloo all-reduce on the CPU: NCCL's barrier may hang without a device of its own."""
    if world.size > 1:
        dist.all_reduce(torch.zeros(1))


def share(value: object, world: World) -> object:
    """Rank 0's `value` on every rank."""
    box = [value]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def everyones(value: T, world: World) -> list[T]:
    """The `value` of every rank, in rank order, on every rank."""
    gathered: list[Any] = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def by_main(call: Callable[[], T], world: World) -> T:
    """Rank 0's call() on every rank. Its ValueError, OSError or LossNotFinite is raised on every rank."""
    result: T | None = None
    failure: Exception | None = None
    if world.is_main:
        try:
            result = call()
        except (ValueError, OSError, LossNotFinite) as error:
            failure = failures.told(error)
    result, failure = share((result, failure), world)  # type: ignore[misc]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def gather_rows(rows: Tensor, world: World) -> Tensor:
    """Rows of all ranks, of which each may have another number, concatenated in rank order on the CPU of every rank."""
    rows = rows.detach().cpu().contiguous()
    if world.size == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    longest = int(max(count.item() for count in counts))
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    pieces = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[: int(count.item())] for piece, count in zip(pieces, counts, strict=True)])
