"""Asking the test cluster about jobs, and waiting for them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

# Seconds after which a wait is a failure: many times what it takes, as a busy machine is slow and not wrong.
PATIENCE = 240
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


def job(jid: str) -> dict[str, str]:
    """What `scontrol show job` says, by field."""
    shown = subprocess.run(["scontrol", "-o", "show", "job", str(jid)], capture_output=True, text=True, check=True).stdout
    return dict(field.split("=", 1) for field in shown.split() if "=" in field)


def wait(jid: str, states: tuple[str, ...] = ENDED, timeout: float = PATIENCE, restarts: int | None = None) -> dict[str, str]:
    """The job once it is in one of `states` (after at least `restarts` restarts). `sbatch --wait` looks only after 2, 10, 42, ... s."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        now = job(jid)
        if now["JobState"] in states and (restarts is None or int(now["Restarts"]) >= restarts):
            return now
        time.sleep(0.25)
    raise AssertionError(f"job {jid} is not in {states} after {timeout} s: {job(jid)}")


def sbatch(*arguments: object) -> str:
    """Submit; the job's id."""
    command = ["sbatch", "--parsable", *map(str, arguments)]
    sent = subprocess.run(command, capture_output=True, text=True, check=False)
    assert sent.returncode == 0, sent.stderr
    return sent.stdout.strip()


def until(condition: Callable[[], object], timeout: float = PATIENCE, tell: Callable[[], str] = str) -> None:
    """Wait for a fact. tell: what a failure shows of the state."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"still waiting after {timeout} s\n{tell()}"
        time.sleep(0.25)
