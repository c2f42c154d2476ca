"""A study's runs on this machine, several at once, each in processes of its own. Killed, the same call goes on."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from megakd.runtime.exits import EXIT_NOT_FINITE, EXIT_SAVED, EXIT_USER_ERROR
from megakd.runtime.run_folder import write_json
from megakd.study import launcher, task
from megakd.study.work import Job, Work

POLL_SECONDS = 0.2
NOT_STARTED = "not started: "
_LINES_KEPT = 400  # of a log, for the last words of a run that fails
# Of these another try has the same end.
_FINAL = (EXIT_USER_ERROR, EXIT_NOT_FINITE)


@dataclass
class _Running:
    process: BaseProcess
    began: float
    slot: int
    tries: int


@dataclass
class Execution:
    """Of `work` in the folder `out`, `at_once` runs at a time. retries: further tries of a failed run. say: where each end is told.

    changed: called when a run has begun or ended.
    """

    work: Work
    out: Path
    at_once: int
    retries: int
    say: Callable[[str], None]
    changed: Callable[[set[str]], None]
    failed: dict[str, str] = field(default_factory=dict)
    _running: dict[str, _Running] = field(default_factory=dict)
    _tries: dict[str, int] = field(default_factory=dict)

    def run(self) -> dict[str, str]:
        """Run what is not done. Returns why each run that is not done at the end is not, by name: its last words, or whose it waited for.

        Ctrl-C and SIGTERM end the runs after a checkpoint, and are raised again.
        """
        waiting = {name: job for name, job in self.work.jobs.items() if not job.done(self.out)}
        total = len(self.work.jobs)
        self.say(f"{total - len(waiting)} of {total} runs are there already" if len(waiting) < total else f"{total} runs")
        os.environ.update(launcher.environment())  # which the processes take over
        self._processes = task.processes(torch.cuda.is_available())
        chains = self.work.longest_chains()
        before = signal.signal(signal.SIGTERM, _interrupted)
        try:
            while waiting or self._running:
                for name in [name for name, job in waiting.items() if self._lost(job)]:
                    del waiting[name]
                ready = [name for name, job in waiting.items() if not any(one in waiting or one in self._running for one in job.after)]
                for name in sorted(ready, key=lambda name: -chains[name]):
                    if len(self._running) < self.at_once:
                        self._start(waiting.pop(name))
                time.sleep(POLL_SECONDS)
                for name in [name for name, one in self._running.items() if not one.process.is_alive()]:
                    if self._ended(self.work.jobs[name]):
                        waiting = {name: self.work.jobs[name], **waiting}
        finally:
            self._stop()
            signal.signal(signal.SIGTERM, before)
        return self.failed

    def _lost(self, job: Job) -> bool:
        """Whether what the job waits for has failed, in which case it is given up."""
        lost = next((name for name in job.after if name in self.failed), None)
        if lost is None:
            return False
        self.failed[job.name] = f"{NOT_STARTED}{lost} failed"
        return True

    def _start(self, job: Job) -> None:
        slot = min(set(range(self.at_once)) - {one.slot for one in self._running.values()})
        variables = {}
        if torch.cuda.is_available() and "CUDA_VISIBLE_DEVICES" not in os.environ:
            # Runs of one rank, each on a GPU of its own, in turn where there are more runs than GPUs.
            variables["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
        log = job.log(self.out)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"$ {job.command(self.out)}\n")
        except OSError as error:
            self.failed[job.name] = f"its log cannot be written: {error}"
            self.say(f"{job.name} failed: {self.failed[job.name]}")
            return
        arguments = (job.kind, str(job.recipe_file(self.out)), str(self.out / job.name), job.options, str(log), variables)
        process = self._processes.Process(target=task.main, args=arguments)  # type: ignore[attr-defined]
        process.start()
        self._tries[job.name] = self._tries.get(job.name, 0) + 1
        self._running[job.name] = _Running(process, time.monotonic(), slot, self._tries[job.name])
        self.changed(set(self._running))

    def _ended(self, job: Job) -> bool:
        """Note a run's end. Returns whether it is to be tried again."""
        one = self._running.pop(job.name)
        code, seconds = one.process.exitcode or 0, time.monotonic() - one.began
        message = ""
        if code or (job.kind != "store" and not job.done(self.out)):
            with job.log(self.out).open(encoding="utf-8", errors="replace") as file:
                message = launcher.last_words(deque(file, _LINES_KEPT)) or f"ended with exit code {code} and without a word"
        again = bool(message) and code not in _FINAL and one.tries <= self.retries
        seconds += self._earlier(job) if code == 0 else 0.0
        # 1: the run has not said that it failed, and its results are not there.
        self._note(job, code or bool(message) * 1, message, seconds, one.tries)
        if message and not again:
            self.failed[job.name] = message
        ended = "is done" if not message else f"failed with exit code {code}" + (", and is tried again" if again else f": {_line(message)}")
        self.say(f"{job.name} {ended} ({seconds:.0f} s)")
        self.changed(set(self._running))
        return again

    def _note(self, job: Job, code: int, message: str, seconds: float, tries: int) -> None:
        """For `Job.state` and the time left. A full disk, by which the run has failed perhaps, is no end of the study."""
        try:
            write_json(job.note(self.out), {"code": code, "message": message, "seconds": seconds, "tries": tries})
        except OSError as error:
            self.say(f"{job.note(self.out)}: cannot be written: {error}")

    def _earlier(self, job: Job) -> float:
        """Seconds of an earlier stretch of this run, which a signal ended."""
        noted = job.noted(self.out)
        seconds = noted.get("seconds") if noted.get("code") == EXIT_SAVED else 0.0
        return float(seconds) if isinstance(seconds, int | float) else 0.0

    def _stop(self) -> None:
        """End what still runs, after a checkpoint, and note the time it took."""
        for one in self._running.values():
            one.process.terminate()
        for name, one in self._running.items():
            one.process.join()
            seconds = time.monotonic() - one.began
            job = self.work.jobs[name]
            self._note(job, EXIT_SAVED, "stopped by a signal", seconds, one.tries)
        self._running.clear()


def _interrupted(number: int, _: object) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def _line(message: str) -> str:
    first = message.splitlines()[0]
    return first if len(first) <= 200 else f"{first[:200]}..."
