"""A process that stands still is ended with its stacks, one that is slow or suspended is not; and two ranks of which one is stopped."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megakd.recipe import Watchdog
from megakd.runtime import watchdog
from megakd.runtime.exits import EXIT_HUNG
from megakd.runtime.launch import World
from megakd.runtime.watchdog import HangWatchdog
from support.processes import python
from support.runs import KD, rows, settings, start_ranks, wait_for

pytestmark = pytest.mark.timeout(180)

PROGRAM = """
import ctypes, sys, threading, time
from pathlib import Path
import torch
from megakd.runtime import watchdog
from megakd.runtime.launch import World

def stand_still():
    time.sleep(60)

def with_the_interpreters_lock():
    ctypes.PyDLL(None).sleep(60)

threading.Thread(target=stand_still, name="loader", daemon=True).start()
watchdog.SECOND_LINE_SECONDS = 2.0
with watchdog.HangWatchdog({limit}, Path(sys.argv[1]), World(3, 8, torch.device("cpu"))):
    print("started", flush=True)
{body}
print("came to its end")
"""


@contextmanager
def _program(run: Path, limit: float, body: str) -> Iterator[subprocess.Popen[str]]:
    """Python code inside a watchdog, in a process that has got there."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    process = python("-c", PROGRAM.format(limit=limit, body=indented), run)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_no_beat_within_the_limit_ends_the_process_with_the_stacks_of_all_threads(tmp_path: Path) -> None:
    began = time.monotonic()
    with _program(tmp_path, 1.0, "watchdog.beat('waiting for data', 7)\nstand_still()") as process:
        _, said = process.communicate(timeout=30)
        assert process.returncode == EXIT_HUNG, said
        assert time.monotonic() - began >= 1.0  # and `communicate` waits for at most 30
    assert (tmp_path / "hung" / "rank_00003.txt").read_text() == said
    assert f"[rank 3 of 8, process {process.pid} on " in said
    assert "no progress for 1 s: step 8, waiting for data." in said
    assert "raise watchdog.limit = 1 (exit code 87)" in said
    assert said.count("in stand_still") == 2, "the main thread and the loader"
    assert "thread MainThread:" in said
    assert "thread loader:" in said
    assert "thread watchdog" not in said


def test_a_run_folder_that_cannot_be_written_does_not_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "hung").write_text("in the way")
    with _program(tmp_path, 0.5, "stand_still()") as process:
        _, said = process.communicate(timeout=30)
        assert process.returncode == EXIT_HUNG
        assert "in stand_still" in said
        assert "the stacks were not written to the run folder: " in said


def test_beats_keep_a_process_that_takes_many_times_the_limit(tmp_path: Path) -> None:
    with _program(tmp_path, 1.0, "for number in range(12):\n    watchdog.beat('student', number)\n    time.sleep(0.3)") as process:
        out, said = process.communicate(timeout=30)
        assert (process.returncode, out, said) == (0, "came to its end\n", "")
    assert not (tmp_path / "hung").exists()


def test_code_that_holds_the_interpreters_lock_is_ended_by_the_second_line(tmp_path: Path) -> None:
    """The thread cannot run then: faulthandler's timer writes the stacks, and knows no exit code but 1."""
    with _program(tmp_path, 1.0, "with_the_interpreters_lock()") as process:
        _, said = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "Timeout" in said
        assert "in with_the_interpreters_lock" in said
    assert not (tmp_path / "hung").exists()


def test_time_in_which_the_process_was_suspended_does_not_count(tmp_path: Path) -> None:
    body = """
for number in range(2):
    watchdog.beat("student", number)
    print("beat", flush=True)
    for piece in range(40):
        time.sleep(0.02)
"""
    with _program(tmp_path, 1.5, body) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)  # the watchdog has seen this beat, and the next is not due
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0, said


def test_a_limit_of_0_watches_nothing(tmp_path: Path) -> None:
    threads = threading.active_count()
    with HangWatchdog(0.0, tmp_path, World(0, 1, torch.device("cpu"))):
        assert threading.active_count() == threads
    with HangWatchdog(60.0, tmp_path, World(0, 1, torch.device("cpu"))):
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads


def test_a_beat_costs_nothing_to_speak_of() -> None:
    """Against the least that a call of a function can cost here; a step beats about ten times."""

    def nothing(phase: str, step: int) -> None:
        pass

    def seconds(call: Callable[[str, int], None]) -> float:
        began = time.process_time()
        for number in range(100_000):
            call("student", number)
        return time.process_time() - began

    assert min(seconds(watchdog.beat) for _ in range(3)) < 10 * min(seconds(nothing) for _ in range(3))


def test_the_default_limit_is_half_an_hour() -> None:
    assert Watchdog().limit == 1800


@dataclass
class Ended:
    """Two ranks after one was stopped for ever: rank 0's end, and how long after the stop it came."""

    code: int
    out: str
    seconds: float
    run: Path


LIMIT = 8.0
STEPS = 2000


@pytest.fixture(scope="module")
def ended(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    """First the other rank stops for a quarter of the limit, several times, and the run goes on; then for ever."""
    run = tmp_path_factory.mktemp("hung") / "run"
    sets = (*KD, f"watchdog.limit={LIMIT}", f"optim.steps={STEPS}", "checkpoint.every=1000")
    ranks = start_ranks("--recipe", recipe_file, "--out", run, *settings(*sets))
    stopped = ranks[1]
    try:
        wait_for(lambda: len(rows(run)) >= 3, ranks[0])
        for _ in range(5):
            stopped.send_signal(signal.SIGSTOP)
            time.sleep(LIMIT / 4)
            before = len(rows(run))
            stopped.send_signal(signal.SIGCONT)
            wait_for(lambda: len(rows(run)) >= before + 2, ranks[0])  # noqa: B023 - asked at once
        stopped.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        out, _ = ranks[0].communicate(timeout=60)
        yield Ended(ranks[0].returncode, out, time.monotonic() - began, run)
        stopped.send_signal(signal.SIGCONT)
        stopped.communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_a_stopped_rank_ends_the_other_soon_after_the_limit(ended: Ended) -> None:
    assert ended.code == EXIT_HUNG, ended.out[-4000:]
    assert LIMIT <= ended.seconds < 3 * LIMIT  # the stacks are written and the interpreter ends in what is left, on a busy machine too


def test_a_run_whose_rank_is_slow_again_and_again_is_not_ended(ended: Ended) -> None:
    """It stood still for longer than the limit in all before it was stopped for good."""
    assert len(rows(ended.run)) >= 13


def test_the_waiting_rank_says_in_which_collective_of_which_step_it_is(ended: Ended) -> None:
    [text] = [path.read_text() for path in (ended.run / "hung").iterdir()]
    assert (ended.run / "hung" / "rank_00000.txt").is_file(), "the stopped one is the one without a file"
    step = len(rows(ended.run)) + 1
    assert f"step {step}, " in text
    main = text.partition("thread MainThread:")[2].partition("\nthread ")[0]
    assert "torch/distributed/" in main
    assert "trainer.py" in main


def test_the_message_says_what_to_do(ended: Ended) -> None:
    assert "The same command goes on from the last checkpoint" in ended.out
    assert f"raise watchdog.limit = {LIMIT:g}" in ended.out
