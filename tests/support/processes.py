"""Programs in fresh processes, for tests of what a fork of `support.forked` would share, and the limits of this one."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from support import REPOSITORY
from support.runs import environment


def start(*command: object, **more: Any) -> subprocess.Popen[str]:
    """In the repository, with text on pipes for what it writes; `more` are options of Popen."""
    options = {"cwd": REPOSITORY, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*map(str, command)], **{**options, **more})


def python(*arguments: object, **more: Any) -> subprocess.Popen[str]:
    """This interpreter, on a file or `-c` and a program."""
    return start(sys.executable, *arguments, **more)


@contextlib.contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: what a full disk is like where none can be mounted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
