"""Work beside the device's other work, on a stream of its own. A CPU takes the same calls: torch has stand-ins for streams there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class SideStream:
    def __init__(self, device: torch.device) -> None:
        self._of: Any = torch.get_device_module(device)
        self._stream = self._of.Stream()

    def follow(self) -> None:
        """What is issued here from now on comes after all that was issued on the current stream until now."""
        self._stream.wait_stream(self._of.current_stream())

    @contextmanager
    def issuing(self) -> Iterator[None]:
        """Inside, work is issued here, and nothing on the stream outside is waited for."""
        with self._of.stream(self._stream):
            yield

    def hand_over(self, value: T) -> Handed[T]:
        """What was made here until now, for another stream."""
        event = self._of.Event()
        event.record(self._stream)
        return Handed(value, self._of, event)


@dataclass(frozen=True)
class Handed(Generic[T]):
    """Tensors, or what holds them (data classes, mappings, sequences), made on one stream for another; `event`: when they are there."""

    value: T
    of: Any
    event: Any

    @property
    def is_there(self) -> bool:
        """Whether it is finished by now. Does not wait."""
        return bool(self.event.query())

    def take(self) -> T:
        """The value, for the current stream alone, which waits until it is there; the host does not.

        Memory is of the stream that it was allocated on, and would be given out there again while this stream still reads it.
        """
        stream = self.of.current_stream()
        self.event.wait(stream)
        for tensor in tensors_in(self.value):
            keep_for(tensor, stream)
        return self.value


def keep_for(tensor: Tensor, stream: Any) -> None:
    """Its memory is not given out again before `stream` has done what it was told until the tensor is let go."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
