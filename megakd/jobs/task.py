"""What each task of a submitted job does: train, and go back into the queue when it is asked to stop.

What happens at a preemption or a time limit is told in runtime/preemption.py. Here the tasks end with 85, and the batch shell requeues the
job, as that of slurm/*.sh does: outside a container, which may have no `scontrol`, and whether the cluster sends a job's own signal or
SIGTERM alone. submitit ignores SIGTERM while the run starts, and SLURM requeues by itself after it. SLURM starts the same pickle again, as
it does after a node failure.

Only what is light is imported here: SLURM's signals are answered from the moment submitit has read the pickle, before torch is there.
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


class RunFailed(RuntimeError):
    """A run's own last words, its exit code and its log: what the submitter gets to see."""

    def __init__(self, said: str, code: int, log: str) -> None:
        super().__init__(f"{said}\nlog: {log}\nexit code: {code}")


@dataclass(frozen=True)
class Training:
    """megakd/train.py with these arguments, as a task of submitit. Plain data: SLURM may start its pickle again days later."""

    arguments: tuple[str, ...]
    out: str
    resume: str

    def __call__(self) -> int:
        """0 when the run has finished. Raises RunFailed with its error; does not return from a job that is requeued."""
        here = submitit.JobEnvironment()
        log = str(here.paths.stdout)
        os.environ[LOG_VARIABLE] = log
        note_early()  # in place of submitit's own handler, which would requeue from here
        # run.json and error messages show the command that does the same without submitit.
        sys.argv = ["megakd/train.py", *self.arguments, "--out", self.out, "--resume", self.resume]
        from megakd.training.command import run_command

        said = _LastWords(sys.stderr)
        with contextlib.redirect_stderr(said):
            code = run_command(sys.argv[1:])
        if code == EXIT_SAVED and here.cluster == "slurm":
            # submitit writes no result for SystemExit: the job has none yet. The batch shell requeues it.
            ignore_from_here()
            sys.exit(EXIT_SAVED)
        if code:
            raise RunFailed(said.last or "saved after a signal; the same command goes on from there", code, log)
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What the requeued job runs. Called by submitit in the moment between its own first line and this task's."""
        return submitit.helpers.DelayedSubmission(self)


class _LastWords(io.TextIOBase):
    """Writes through to a stream and remembers the last thing said: the message of an error, which is printed in one call."""

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
