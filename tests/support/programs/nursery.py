"""Forks programs, see `support.forked`: `nursery.py SOCKET` reads requests until the other end is closed."""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any


def main() -> dict[str, Any] | None:
    """The request that this process, a fork, is to run; None where no more come."""
    gc.disable()  # while what is imported piles up, which takes a second less
    import megakd.training.run
    import megakd.vqa.evaluate  # noqa: F401

    gc.enable()
    gc.collect()
    gc.freeze()  # a collection in a program looks at what it made itself, and leaves the shared pages alone
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are nobody's to wait for
    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        content, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not content:
            return None
        if os.fork() == 0:
            requests.close()
            return _kept(json.loads(content), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _kept(request: dict[str, Any], output: int, status: int) -> dict[str, Any]:
    """Forks the program and stays beside it to tell its process id and how it ended. Returns in the program alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if program := os.fork():
        os.close(output)
        os.write(status, f"{program}\n".encode())
        ended = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        os.write(status, f"{ended}\n".encode())
        os._exit(0)
    os.close(status)
    os.setsid()
    for place in (1, 2):
        os.dup2(output, place)
    os.close(output)
    return request


if __name__ == "__main__":
    if request := main():
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = request["command"]
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
