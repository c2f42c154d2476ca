"""What a step costs, as metrics.jsonl tells it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from megakd.runtime.stopwatch import Stopwatch
from support.runs import environment

PROGRAM = "import torch; from megakd.runtime.stopwatch import memory_gb; print(memory_gb(torch.device('cpu')))"


def test_the_peak_is_the_processs_own_and_not_that_of_the_one_that_started_it() -> None:
    ballast = b"\1" * 10**9
    told = subprocess.run([sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True, check=True).stdout
    assert 0.1 < float(told) < len(ballast) / 1e9


def test_processor_time_is_told_by_part_and_waiting_is_not_in_it() -> None:
    watch = Stopwatch(torch.device("cpu"))
    _work(0.05)
    watch.restart()  # what came before counts for no part
    with watch.host("data"):
        time.sleep(0.3)
    with watch.part("loss"):
        _work(0.05)
    _work(0.05)
    seconds, busy = watch.read(), watch.read_processor()
    assert seconds["data"] >= 0.3 > busy["data"] + 0.2
    assert 0.05 <= busy["loss"] <= 1.01 * seconds["loss"]
    assert busy["other"] >= 0.05
    assert sum(busy.values()) < 0.3
    assert watch.read_processor() == {"other": pytest.approx(0, abs=0.05)}


def test_what_is_done_aside_is_no_part_and_the_steps_before_it_stay_counted() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with watch.part("student"):
        _work(0.1)
    with watch.aside():
        _work(0.3)
    assert watch.read().keys() == {"student"}
    busy = watch.read_processor()
    assert 0.1 <= busy["student"] < 0.3
    assert -0.01 < busy["other"] < 0.1


def _work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
