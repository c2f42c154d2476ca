"""Python programs in processes of their own that need not import torch, DeepSpeed and transformers, eight seconds of a processor each time.

One process, `programs/nursery.py`, has imported them and forks itself for each program. A program has its own arguments, variables, folder,
session and output as a fresh process would; what it shares is what was imported, and the seed of Python's hashes. Where the interpreter's
start, the order of imports or a launcher is the subject, tests start fresh processes: `support.runs.launch` and `subprocess`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from support import PROGRAMS


class Forked:
    """A program that was started; what of `subprocess.Popen` the tests use, and like it there."""

    def __init__(self, output: int, status: int) -> None:
        self._output, self._status, self._said = output, status, b""
        self.returncode: int | None = None
        self.pid = int(self._line())

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            more = os.read(self._status, 1)
            if not more:
                raise RuntimeError("the process that forks the tests' programs ended")
            line += more
        return line.decode()

    def poll(self) -> int | None:
        return self._ended(0)

    def _ended(self, seconds: float) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            self.returncode = int(self._line())
            os.close(self._status)
        return self.returncode

    def communicate(self, timeout: float = 3600) -> tuple[str, None]:
        """All it wrote. Raises subprocess.TimeoutExpired, after which it may be asked again."""
        end = time.monotonic() + timeout
        while self._output >= 0 and select.select([self._output], [], [], max(end - time.monotonic(), 0))[0]:
            more = os.read(self._output, 1 << 16)
            self._said += more
            if not more:
                os.close(self._output)
                self._output = -1
        if self._output >= 0 or self._ended(max(end - time.monotonic(), 0)) is None:
            raise subprocess.TimeoutExpired("a forked program", timeout, self._said)
        return self._said.decode(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(command: list[str], environment: dict[str, str], folder: Path) -> Forked:
    """Start `command`, a Python file and its arguments, in a session of its own; what it writes to stdout and stderr comes together."""
    (output, out), (status, told) = os.pipe(), os.pipe()
    request = json.dumps({"command": command, "environment": environment, "folder": str(folder)}).encode()
    socket.send_fds(_nursery(), [request], [out, told])
    os.close(out)
    os.close(told)
    return Forked(output, status)


@functools.cache
def _nursery() -> socket.socket:
    from support.runs import environment  # here: that module starts ranks by this one

    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, str(PROGRAMS / "nursery.py"), str(its.fileno())]
    subprocess.Popen(command, env=environment(), pass_fds=[its.fileno()], start_new_session=True)  # ends when this process does
    its.close()
    return ours
