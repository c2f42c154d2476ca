"""What each task of a submitted job does: train, and go back into the queue when it is asked to stop.

Preemption and time limits. While a run trains, `StopRequest` takes SIGTERM, SIGUSR1 and SIGUSR2; all ranks save at the step's end and
`run_command` returns 85 with submitit's handlers put back. Rank 0 then raises submitit's own signal in its process, whose handler
writes the pickle and requeues the job; so it does not matter whether the cluster sends that signal at a preemption, or SIGTERM alone.
Before training there is nothing to save: submitit's handler requeues at once on its signal and ignores SIGTERM, after which SLURM
requeues by itself. After a node failure SLURM starts the first pickle again. In every case the run goes on from its newest checkpoint.

Only what is light is imported here: SLURM's signals are answered from the moment submitit has read the pickle, before torch is there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import submitit

from megakd import cluster
from megakd.runtime.signals import EXIT_SAVED
from megakd.runtime.slurm_job import LOG_VARIABLE, job_id, restarts

# Longer than SLURM takes to end a job that it puts back into the queue.
UNTIL_ENDED = 600.0


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
        # run.json and error messages show the command that does the same without submitit.
        sys.argv = ["megakd/train.py", *self.arguments, "--out", self.out, "--resume", self._resume()]
        from megakd.start import run_command

        said = _LastWords(sys.stderr)
        with contextlib.redirect_stderr(said):
            code = run_command(sys.argv[1:])
        if code == EXIT_SAVED and here.cluster == "slurm":
            _requeue(here)
        if code:
            raise RunFailed(said.last or "saved after a signal; the same command goes on from there", code, log)
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What the requeued job runs. Called by submitit in a signal handler; the training has saved before."""
        return submitit.helpers.DelayedSubmission(self)

    def _resume(self) -> str:
        """`--resume` of the first start; once this job has left checkpoints of its own, a restart goes on from the newest."""
        run = Path(self.out)
        if not restarts(os.environ) or not (run / "run.json").exists() or not list((run / "checkpoints").glob("step_*")):
            return self.resume
        jobs = json.loads((run / "run.json").read_text(encoding="utf-8")).get("jobs", [])
        return "auto" if any(job["slurm_job_id"] == job_id(os.environ) for job in jobs) else self.resume


def _requeue(here: submitit.JobEnvironment) -> None:
    """Send this job back into the queue; does not return.

    By SystemExit, for which submitit writes no result: the job has none yet. A job that is being cancelled gets SIGTERM too, and would be
    started again by a requeue.
    """
    if here.global_rank == 0:
        if not cluster.is_running(os.environ["SLURM_JOB_ID"]):
            print("this job is ending by itself, it is not requeued", flush=True)
            sys.exit(EXIT_SAVED)
        signal.raise_signal(here._usr_sig())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(UNTIL_ENDED)
    sys.exit(EXIT_SAVED)


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
