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
    """Held from creation to the end of the block, or of this process.

    A POSIX record lock, which child processes do not inherit, so that no loader worker holds it longer than the job. An NFS server of
    version 3 does not notice that a client died: a job that SLURM starts again takes the lock from its own earlier start. Where the file
    system has no locks the job is warned and goes on without.
    """

    def __init__(self, folder: Path, *, doing: str, remedy: str, error: type[ValueError] = ValueError, timeout: float = 0.0) -> None:
        """doing: what the holder does there, after its name in the error. timeout: seconds to wait for a holder that may be dying.

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
            job = re.search(r", SLURM job (\S+), restart (\d+)$", holder)
            if job is None or job[1] != environment.job_id(os.environ) or int(job[2]) >= environment.restarts(os.environ):
                dead = f"if it is dead and the file system has not noticed (NFS), rm {path}"
                raise error(f"{folder}: {holder} {doing}; {remedy}; {dead}") from reason
            log.warning("%s: taken over from an earlier start of this job, %s", path, holder)
            path.unlink(missing_ok=True)
            self._file = path.open("a+", encoding="utf-8")
            self._take(time.monotonic())
        except OSError as reason:
            log.warning("%s: no locks on this file system (%s): see to it that no second job works in this folder", path, reason)
        this_job = environment.job_id(os.environ)
        slurm = f", SLURM job {this_job}, restart {environment.restarts(os.environ)}" if this_job else ""
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{slurm}\n")
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


def held(folder: Path) -> bool | None:
    """Whether another process holds the folder's lock, without taking it; None on a file system without locks."""
    try:
        with (folder / LOCK).open("rb") as file:
            # struct flock of 64-bit Linux: type, whence, start, length, process
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return bool(struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK)
