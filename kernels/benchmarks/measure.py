"""One call measured: seconds of its two halves and, on CUDA, its peak memory; and the rate of plain matrix products on the same device.

A sample is a forward call that keeps what its backward pass needs, and the gradients of image, text and scale. On CUDA events time it
after the L2 cache has been overwritten; on the CPU a clock does. Peak memory on the CPU is `memory.py`'s, in a process of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Twice and more the L2 of any present device (H200: 60 MB), so that inputs come from memory as they do after a model's forward pass.
FLUSH_BYTES = 256 << 20
MATRIX_SIZES = {"cuda": (4096, 8192, 16384), "cpu": (512, 1024, 2048)}


class Timing(NamedTuple):
    """Seconds; bytes at the peak beyond what was allocated before (inputs are not counted, gradients are), None where not known."""

    forward: float
    backward: float
    forward_bytes: int | None = None
    both_bytes: int | None = None

    @property
    def both(self) -> float:
        return self.forward + self.backward


class Meter:
    """Takes samples on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        # One thread: its own time, so that what other processes take of its core does not count.
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self._is_cuda else None

    def sample(self, function: Callable[..., Tensor], student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Timing:
        """Both passes once; `student` holds leaves."""
        return self._cuda(function, student, teacher) if self._is_cuda else self._cpu(function, student, teacher)

    def _cpu(self, function: Callable[..., Tensor], student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Timing:
        start = self._clock()
        loss = function(student, teacher)
        middle = self._clock()
        gradients(loss, student)
        return Timing(middle - start, self._clock() - middle)

    def _cuda(self, function: Callable[..., Tensor], student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Timing:
        assert self._flushed is not None
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._flushed.zero_()
        start.record()
        loss = function(student, teacher)
        middle.record()
        forward_bytes = torch.cuda.max_memory_allocated(self.device) - before  # the host's count: waits for nothing
        gradients(loss, student)
        end.record()
        both_bytes = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.synchronize(self.device)
        return Timing(start.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3, forward_bytes, both_bytes)

    def clear(self) -> None:
        """Gives back what a failed call held. Outside the `except` block, that is, whose traceback holds it too."""
        gc.collect()
        if self._is_cuda:
            torch.cuda.empty_cache()

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Operations a second of a square `torch.mm` of random numbers, of the best size: the median on CUDA, the best on the CPU.

        A CPU is shared: what others take of it in this moment must not raise everybody's share of the rate.
        """
        return max(self._rate(size, dtype) for size in MATRIX_SIZES[self.device.type])

    def _rate(self, size: int, dtype: torch.dtype) -> float:
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        product = torch.empty(size, size, device=self.device, dtype=dtype)

        def seconds() -> float:
            if not self._is_cuda:
                began = self._clock()
                torch.mm(left, right, out=product)
                return self._clock() - began
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.mm(left, right, out=product)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        times = torch.tensor([seconds() for _ in range(10)][2:])
        return 2 * size**3 / (times.median() if self._is_cuda else times.min()).item()


def gradients(loss: Tensor, student: tuple[Tensor, ...]) -> None:
    torch.autograd.grad(loss, student, allow_unused=True)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
