"""Peak memory of a call on the CPU: a process that measures nothing else and gives freed memory back at once.

The process reads one case a line from its input and answers with the growth of its resident set at the peak. malloc is told to map
every block above 64 KB by itself, so a freed block leaves the process and the peak is what the call held, not what the heap kept.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from cases import LossCase
from measure import gradients

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": "0"}


class Peaks(NamedTuple):
    """Bytes beyond what was resident before the call."""

    forward: int
    both: int


class Watcher:
    """Asks the process, and starts it (again) where it is not running."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def peaks(self, case: LossCase, dtype: torch.dtype) -> Peaks | None:
        """None where this system does not say (no /proc), or the process ended: killed for memory, most likely."""
        if self._process is None:
            command = [sys.executable, str(Path(__file__).resolve())]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                command, env={**os.environ, **MALLOC, "PYTHONWARNINGS": "ignore"}, stdin=pipe, stdout=pipe, text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([*case, str(dtype).removeprefix("torch.")]), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self.close()
            return None
        for line in self._process.stdout:
            if line.startswith("peaks "):  # compilers write to the same output
                answer = json.loads(line.removeprefix("peaks "))
                return None if answer is None else Peaks(*answer)
        self.close()
        return None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def _measure(case: LossCase, dtype: torch.dtype) -> Peaks | None:
    function = case.function()
    student, teacher = case.inputs(torch.device("cpu"), dtype)
    # Libraries start here, and a compiled loss is compiled at its real size, which takes more memory than the loss.
    warm = case if case.compiles else case._replace(pairs=16)
    small, small_teacher = warm.inputs(torch.device("cpu"), dtype)
    gradients(function(small, small_teacher), small)
    del small, small_teacher
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here: man 5 proc
    except OSError:
        return None
    before = _memory("VmRSS")
    loss = function(student, teacher)
    forward = _memory("VmHWM") - before
    gradients(loss, student)
    return Peaks(max(0, forward), max(0, _memory("VmHWM") - before))


def main() -> None:
    for line in sys.stdin:
        *case, dtype = json.loads(line)
        try:
            peaks = _measure(LossCase(*case), getattr(torch, dtype))
        except Exception as error:  # the row goes without its memory; the next case is still answered
            print(f"no memory for {case}: {error}", file=sys.stderr)
            peaks = None
        print("peaks", json.dumps(peaks), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
