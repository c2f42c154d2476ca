"""What a step costs: seconds of its named parts, by host time on a CPU and by events on a GPU, and memory.

What torch.compile takes meanwhile, while the device waits, is in none of them: it is a part of its own, "compile", where there is some.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from megakd.runtime import compiler

COMPILE = "compile"


class Stopwatch:
    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the work issued inside as `name`."""
        if not self._cuda:
            with self.host(name):
                yield
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        compiled = compiler.seconds()
        before.record()
        yield
        after.record()
        self._events.append((name, before, after))
        self._take_out(name, compiler.seconds() - compiled)

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Count host time, whatever the device."""
        start, compiled = time.perf_counter(), compiler.seconds()
        yield
        self._seconds[name] += time.perf_counter() - start
        self._take_out(name, compiler.seconds() - compiled)

    def _take_out(self, name: str, compiling: float) -> None:
        if compiling:
            self._seconds[name] -= compiling
            self._seconds[COMPILE] += compiling

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading; waits for the device when there are events."""
        for name, before, after in self._events:
            after.synchronize()
            self._seconds[name] += before.elapsed_time(after) / 1000
        self._events.clear()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else resident_gb("VmHWM")


def resident_gb(field: Literal["VmRSS", "VmHWM"]) -> float:
    """Resident memory of this process in GB, now or at its peak. getrusage's peak begins with that of the process that started it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # where a sandbox keeps it to itself
