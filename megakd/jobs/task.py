"""What each task of a submitted job does: train, and exit with 85 when it has saved after a signal.

See runtime/preemption.py. The batch shell requeues the job, as in slurm/*.sh: outside a container, which may have no `scontrol`. submitit
ignores SIGTERM while the run starts, after which SLURM requeues by itself; it starts the same pickle again, as after a node failure.

Light imports alone: signals are noted from the moment submitit has read the pickle, before torch is there.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from typing import TextIO

import submitit

from megakd.runtime.environment import LOG_VARIABLE
from megakd.runtime.exits import EXIT_SAVED
from megakd.runtime.preemption import ignore_from_here, note_early
from megakd.runtime.starting import without_garbage_collection


class RunFailed(RuntimeError):
    """For the submitter: the run's last message, its exit code and its log."""

    def __init__(self, message: str, code: int, log: str) -> None:
        super().__init__(f"{message}\nlog: {log}\nexit code: {code}")


@dataclass(frozen=True)
class Training:
    """megakd/train.py with these arguments, as a task of submitit; SLURM may start its pickle again days later."""

    arguments: tuple[str, ...]
    out: str
    resume: str

    def __call__(self) -> int:
        """0 when the run has finished. Raises RunFailed with its error; does not return from a job that is requeued."""
        here = submitit.JobEnvironment()
        log = str(here.paths.stdout)
        os.environ[LOG_VARIABLE] = log
        note_early()  # in place of submitit's own handler, which would requeue from here
        # run.json and error messages show the command without submitit
        sys.argv = ["megakd/train.py", *self.arguments, "--out", self.out, "--resume", self.resume]
        with without_garbage_collection():
            from megakd.training.command import run_command

        errors = _LastMessage(sys.stderr)
        with contextlib.redirect_stderr(errors):
            code = run_command(sys.argv[1:])
        if code == EXIT_SAVED and here.cluster == "slurm":
            # submitit writes no result for SystemExit; the batch shell requeues the job
            ignore_from_here()
            sys.exit(EXIT_SAVED)
        if code:
            raise RunFailed(errors.last or "saved after a signal; the same command goes on from there", code, log)
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What the requeued job runs; submitit calls it for a signal before this task's first line."""
        return submitit.helpers.DelayedSubmission(self)


class _LastMessage(io.TextIOBase):
    """Writes through to a stream and keeps the last text: the message of an error, which is printed in one call."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.last = stream, ""

    def write(self, text: str) -> int:
        if text.strip():
            self.last = text.strip()
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()
