"""One job at a time in a folder."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import struct
import time
from pathlib import Path

from megakd.runtime import environment

LOCK = "lock"

log = logging.getLogger("megakd.runtime")


class FolderLock:
    """Held from creation to the end of the block, or to the end of this process, however it ends: the kernel forgets the locks of the dead.

    A POSIX record lock, which child processes do not inherit, so that no loader worker can hold it longer than the job. Over NFS it works
    too, but a server of version 3 does not notice that a client died: a job that SLURM starts again, and has ended before, takes the
    lock from its earlier start. Where the file system has no locks the job is warned and goes on without.
    """

    def __init__(self, folder: Path, *, doing: str, remedy: str, error: type[ValueError] = ValueError, timeout: float = 0.0) -> None:
        """doing: what the holder does there, after its name. timeout: seconds to wait for a holder that may be dying.

        Raises `error` when another process holds it after that, or nothing can be written.
        """
        path = folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")
        except OSError as reason:
            raise error(f"{folder}: cannot be written ({reason}); choose another --out") from reason
        try:
            self._take(time.monotonic() + timeout)
        except (BlockingIOError, PermissionError) as reason:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            if not _is_earlier_start_of_this_job(holder):
                dead = f"if it is dead and the file system has not noticed (NFS), rm {path}"
                raise error(f"{folder}: {holder} {doing}; {remedy}; {dead}") from reason
            log.warning("%s: taken over from an earlier start of this job, %s", path, holder)
            path.unlink(missing_ok=True)
            self._file = path.open("a+", encoding="utf-8")
            self._take(time.monotonic())
        except OSError as reason:
            log.warning("%s: no locks on this file system (%s): see to it that no second job works in this folder", path, reason)
        self._file.truncate(0)
        self._file.write(f"{_holder()}\n")
        self._file.flush()

    def _take(self, deadline: float) -> None:
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.truncate(0)
        self._file.close()


def _holder() -> str:
    job = environment.job_id(os.environ)
    slurm = f", SLURM job {job}, restart {environment.restarts(os.environ)}" if job else ""
    return f"process {os.getpid()} on {socket.gethostname()}{slurm}"


def _is_earlier_start_of_this_job(holder: str) -> bool:
    """Whether a lock's holder is an earlier start of this SLURM job."""
    match = re.search(r", SLURM job (\S+), restart (\d+)$", holder)
    return match is not None and match[1] == environment.job_id(os.environ) and int(match[2]) < environment.restarts(os.environ)


def held(folder: Path) -> bool | None:
    """Whether a process holds the folder's lock, asked without taking it; None on a file system without locks.

    Of this process's own locks the kernel says nothing.
    """
    try:
        with (folder / LOCK).open("rb") as file:
            # struct flock of 64-bit Linux: type, whence, start, length (0: to the end), process
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return bool(struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK)
