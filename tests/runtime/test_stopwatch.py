"""What a step costs, as metrics.jsonl tells it."""

from __future__ import annotations

import subprocess
import sys

from support.runs import environment

PROGRAM = "import torch; from megakd.runtime.stopwatch import memory_gb; print(memory_gb(torch.device('cpu')))"


def test_the_peak_is_the_processs_own_and_not_that_of_the_one_that_started_it() -> None:
    ballast = b"\1" * 10**9
    told = subprocess.run([sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True, check=True).stdout
    assert 0.1 < float(told) < len(ballast) / 1e9
