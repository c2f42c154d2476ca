"""A rank that makes no progress ends its job, with the stacks of its threads, instead of holding the allocation to its time limit.

Progress calls `beat`, and a thread waits for it. A rank that waits in a collective makes none either, so every rank but the stopped one
ends itself and writes RUN/hung/rank_00003.txt: the one without a file hung, or its machine died.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

from megakd.runtime.exits import EXIT_HUNG
from megakd.runtime.launch import World

HUNG = "hung"
# After the limit, faulthandler's timer ends a process whose thread could not: C code may hold the interpreter's lock, a file system hang.
SECOND_LINE_SECONDS = 60.0
LONGEST_TICK_SECONDS = 10.0
STDERR = 2

_latest: tuple[str, int | None] = ("starting", None)


def beat(phase: str, step: int | None = None) -> None:
    """Note that this process has come to `phase`, of the step after `step` steps. Takes less than a microsecond."""
    global _latest  # of the process
    _latest = (phase, step)


class HangWatchdog:
    """Ends this process with EXIT_HUNG when no beat came for `limit` seconds inside the block; 0 watches nothing.

    Time in which the process was stopped (`scontrol suspend`) does not count, but for faulthandler's timer: a run that was suspended for
    longer than the limit and SECOND_LINE_SECONDS ends with exit code 1 when it goes on.
    """

    def __init__(self, limit: float, run: Path, world: World) -> None:
        self._limit, self._run, self._world = limit, run, world
        self._tick = min(LONGEST_TICK_SECONDS, limit / 20)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> HangWatchdog:
        beat("starting")
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._limit:
            self._over.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seen, idle, looked = _latest, 0.0, time.monotonic()
        self._second_line(idle)
        while not self._over.wait(self._tick):
            now = time.monotonic()
            # in a much longer tick the process was stopped
            idle, looked = idle + min(now - looked, 2 * self._tick), now
            if _latest is not seen:
                seen, idle = _latest, 0.0
            elif idle >= self._limit:
                self._end(idle)
            self._second_line(idle)

    def _second_line(self, idle: float) -> None:
        faulthandler.dump_traceback_later(self._limit - idle + SECOND_LINE_SECONDS, exit=True, file=STDERR)

    def _end(self, idle: float) -> None:
        try:
            phase, step = _latest
            where = phase if step is None else f"step {step + 1}, {phase}"
            who = f"rank {self._world.rank} of {self._world.size}, process {os.getpid()} on {socket.gethostname()}"
            message = (
                f"[{who}] no progress for {idle:.0f} s: {where}. Each rank that could still tell writes its stacks to {self._run / HUNG}; "
                f"one without a file there is where to look. The same command goes on from the last checkpoint; if this was no hang but "
                f"slow work, raise watchdog.limit = {self._limit:g} (exit code {EXIT_HUNG})"
            )
            text = f"{message}\n\n{_stacks()}"
            os.write(STDERR, text.encode())
            path = self._run / HUNG / f"rank_{self._world.rank:05d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            os.write(STDERR, f"the stacks were not written to the run folder: {error}\n".encode())
        finally:
            os._exit(EXIT_HUNG)


def _stacks() -> str:
    """The stack of every Python thread, innermost call last; the watchdog's own left out."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    )
