"""Streams as a GPU has them, for the CPU: every operator in a `with` is held to have run whenever its stream's order allows.

What is found is what would go wrong on a GPU, though the CPU computes in order: memory that is read before the stream that wrote it was
waited for, or written while another reads it, and memory that its stream gives out again while another may still read it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megakd.runtime import side_stream


class Stream:
    """seen: of each stream, how much of it comes before what is issued here next."""

    def __init__(self) -> None:
        self.seen: Counter[Stream] = Counter()

    def now(self) -> int:
        return self.seen[self]

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.seen


class Event:
    """A point of a stream."""

    def __init__(self) -> None:
        self._seen: Counter[Stream] = Counter()

    def record(self, stream: Stream) -> None:
        self._seen = Counter(stream.seen)

    def wait(self, stream: Stream) -> None:
        stream.seen |= self._seen

    def query(self) -> bool:
        return True


class StreamOrder(TorchDispatchMode):
    """In the place of `torch.cpu` for `SideStream`. found: what would go wrong, in words; handed: tensors that two streams used."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.handed = 0
        self._current = Stream()
        self._written: weakref.WeakKeyDictionary[Any, tuple[Stream, int]] = weakref.WeakKeyDictionary()
        self._used: weakref.WeakKeyDictionary[Any, dict[Stream, int]] = weakref.WeakKeyDictionary()
        self._kept: weakref.WeakKeyDictionary[Any, set[Stream]] = weakref.WeakKeyDictionary()

    def current_stream(self) -> Stream:
        return self._current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def forget(self, tensor: Tensor) -> None:
        """It is the host's, which streams do not order."""
        for known in (self._written, self._used, self._kept):
            known.pop(tensor.untyped_storage(), None)

    def keep_for(self, tensor: Tensor, stream: Stream) -> None:
        self._kept.setdefault(tensor.untyped_storage(), set()).add(stream)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(side_stream.tensors_in((args, kwargs or {})))
        out = func(*args, **(kwargs or {}))
        here = self._current
        here.seen[here] += 1
        if not _is_view(func):
            for tensor in given:
                self._read(tensor.untyped_storage(), func)
        for tensor in side_stream.tensors_in(out):
            storage = tensor.untyped_storage()
            if storage not in self._used:
                self._used[storage], kept = {}, self._kept.setdefault(storage, set())
                weakref.finalize(storage, self._freed, here, self._used[storage], kept, func).atexit = False
                self._written[storage] = here, here.now()
            elif func._schema.is_mutable:
                if any(here.seen[stream] < when for stream, when in self._used[storage].items()):
                    self.found.append(f"{func}: writes what another stream still reads")
                self._written[storage] = here, here.now()
        return out

    def _read(self, storage: Any, func: Any) -> None:
        here = self._current
        stream, when = self._written.get(storage, (here, 0))
        if here.seen[stream] < when:
            self.found.append(f"{func}: reads what another stream has not finished")
        if storage in self._used:
            self._used[storage][here] = here.now()

    def _freed(self, pool: Stream, used: dict[Stream, int], kept: set[Stream], func: Any) -> None:
        others = {stream: when for stream, when in used.items() if stream is not pool}
        self.handed += bool(others)
        if any(pool.seen[stream] < when and stream not in kept for stream, when in others.items()):
            self.found.append(f"{func}: its memory is given out again while another stream reads it")


def _is_view(func: Any) -> bool:
    return bool(func.is_view)


@contextlib.contextmanager
def streams_of_a_gpu(monkeypatch: Any) -> Iterator[StreamOrder]:
    order, of, cpu = StreamOrder(), torch.get_device_module, torch.device("cpu")
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: order if device == cpu else of(device))
    monkeypatch.setattr(side_stream, "keep_for", order.keep_for)
    with order:
        yield order
