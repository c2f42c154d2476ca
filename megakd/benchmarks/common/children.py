"""Programs that a benchmark starts: each in a process group of its own, which ends, with all it started, with the block that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

import psutil

T = TypeVar("T")

POLL = 0.2  # seconds between two looks at a child's log: too rare to take time from it
# A launcher's variables would make a child believe that it is one rank of many.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("SLURM_", "PMI_", "OMPI_", "TORCHELASTIC_")


class Child:
    """A running program, its output in a file."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self._process, self.output = process, output

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, found: Callable[[], T | None], seconds: float) -> T:
        """What `found` returns as soon as it returns something. Raises ValueError when the program ends or `seconds` pass before."""
        end = time.monotonic() + seconds
        while True:
            ended = self._process.poll()  # before looking, so that the last words of a program that has just ended count
            if (result := found()) is not None:
                return result
            if ended is not None:
                raise ValueError(f"{self._name()} ended with exit code {ended} before it had measured enough.{self._last_lines()}")
            if time.monotonic() > end:
                slow = f"{self._name()} has not measured enough after {seconds:.0f} s; ask for fewer steps or a smaller batch."
                raise ValueError(slow + self._last_lines())
            time.sleep(POLL)

    def processor_seconds(self) -> float:
        """Processor time of the living processes of its group so far: waiting for a processor is not in it."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                # after the name, which is in brackets and may hold anything: state, parent, group, ..., user and system ticks
                fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12]) if int(fields[2]) == self._process.pid else 0
        return ticks / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Kill the whole group, and what left it (torchrun starts each rank in a session of its own): the program is measured, what it
        would still write is of no use.
        """
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self._process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _name(self) -> str:
        arguments = self._process.args
        return " ".join(map(str, arguments[:4])) + " ..." if isinstance(arguments, list) else str(arguments)

    def _last_lines(self) -> str:
        return "\nIts last lines:\n  " + "\n  ".join(self.text().splitlines()[-15:])


@contextlib.contextmanager
def running(command: list[str], folder: Path, name: str, threads: int) -> Iterator[Child]:
    """`command` in `folder` with `threads` OpenMP threads; killed with its workers at the end of the block, whatever ends it."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"{name}.out"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=environ(threads), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    child = Child(process, output)
    try:
        yield child
    finally:
        child.end()


def environ(threads: int) -> dict[str, str]:
    """This process's environment without launchers' variables, with equal numbers of threads for every child."""
    kept = {key: value for key, value in os.environ.items() if key not in _LAUNCHER and not key.startswith(_LAUNCHER_PREFIXES)}
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that the blocks of `running` end their children."""

    def unwind(number: int, frame: FrameType | None) -> None:
        del frame
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
