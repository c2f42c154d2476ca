"""Signals are noted while a run lasts; afterwards a calling program hears of them again, and one without handlers is not killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megakd.runtime.preemption import WATCHED, StopRequest


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in WATCHED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_within_is_noted_and_one_after_reaches_the_calling_programs_own_handler(number: signal.Signals) -> None:
    heard: list[int] = []
    signal.signal(number, lambda received, _: heard.append(received))
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop
        assert stop.signal == number
        assert heard == []
    signal.raise_signal(number)
    assert heard == [number]


def test_a_program_without_handlers_survives_the_signal_that_a_launcher_sends_to_ranks_that_are_ending() -> None:
    for number in WATCHED:
        signal.signal(number, signal.SIG_DFL)
    with StopRequest():
        pass
    for number in WATCHED:
        signal.raise_signal(number)


def test_a_program_that_is_ending_keeps_its_exit_code_whatever_signal_comes() -> None:
    """Python gives SIGTERM its default action back before it has ended."""
    program = (
        "import os, sys\n"
        "from megakd.runtime.preemption import ignore_from_here\n"
        "class Late:\n    def __del__(self, kill=os.kill, pid=os.getpid()):\n        kill(pid, 15)\n"
        "sys.late = Late()\n"  # deleted with the modules, after the signal handlers are gone
        "ignore_from_here()\n"
        "sys.exit(85)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 85
