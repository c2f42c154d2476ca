"""What a step costs: seconds of its named parts, by host time on a CPU and by events on a GPU, processor time of the same parts, memory.

What torch.compile takes meanwhile, while the device waits, is in none of them: it is a part of its own, "compile", where there is some.
Processor time is that of this process's threads, in which waiting for data, for other ranks and for a busy core is not: on a machine that
others use it is the number that repeats. The loader's workers are processes of their own and are not in it; compiling is, in its part.
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
        self._processor: dict[str, float] = defaultdict(float)
        self._since = time.process_time()
        self._beside: dict[str, float] = defaultdict(float)
        self._events: list[tuple[dict[str, float], str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str, *, beside: bool = False) -> Iterator[None]:
        """Count what the current stream takes for what is issued inside, and what it waits there, as `name`.

        beside: on a stream beside that of the other parts, which the time is not added to; a CPU has one after the other.
        """
        if not self._cuda:
            with self.host(name):
                yield
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        seconds = self._beside if beside else self._seconds
        compiled, busy = compiler.seconds(), time.process_time()
        before.record()
        yield
        after.record()
        self._processor[name] += time.process_time() - busy
        self._events.append((seconds, name, before, after))
        self._take_out(seconds, name, compiler.seconds() - compiled)

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Count host time, whatever the device."""
        start, compiled, busy = time.perf_counter(), compiler.seconds(), time.process_time()
        yield
        self._seconds[name] += time.perf_counter() - start
        self._processor[name] += time.process_time() - busy
        self._take_out(self._seconds, name, compiler.seconds() - compiled)

    def _take_out(self, seconds: dict[str, float], name: str, compiling: float) -> None:
        if compiling:
            seconds[name] -= compiling
            self._seconds[COMPILE] += compiling

    def restart(self) -> None:
        """What this process has done until now was no step."""
        self._since = time.process_time()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside is no step, as an evaluation is none; the steps before it stay counted."""
        busy = time.process_time()
        yield
        self._since += time.process_time() - busy

    def read(self) -> dict[str, float]:
        """Seconds by name since the last reading; waits for the device when there are events."""
        self._settle()
        return _taken(self._seconds)

    def read_beside(self) -> dict[str, float]:
        """Likewise, of what was beside the other parts."""
        self._settle()
        return _taken(self._beside)

    def read_processor(self) -> dict[str, float]:
        """Processor seconds by name since the last reading or restart; "other" is what this process did outside of the parts."""
        now, parts = time.process_time(), dict(self._processor)
        spent, self._since, self._processor = now - self._since, now, defaultdict(float)
        return {**parts, "other": spent - sum(parts.values())}

    def _settle(self) -> None:
        for seconds, name, before, after in self._events:
            after.synchronize()
            seconds[name] += before.elapsed_time(after) / 1000
        self._events.clear()


def _taken(seconds: dict[str, float]) -> dict[str, float]:
    taken = dict(seconds)
    seconds.clear()
    return taken


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else resident_gb("VmHWM")


def resident_gb(field: Literal["VmRSS", "VmHWM"]) -> float:
    """Resident memory of this process in GB, now or at its peak. getrusage's peak begins with that of the process that started it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # where a sandbox keeps it to itself
