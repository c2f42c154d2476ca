"""Ctrl-C ends a run at once: it has an exit code of its own, and the same command goes on from the last checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from megakd.runtime import checkpoint
from support.runs import REPOSITORY, environment, finish, rows, settings, train, wait_for

SETS = ("optim.steps=100", "checkpoint.every=5")


def test_ctrl_c_ends_a_run_with_130_and_the_same_command_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--recipe", str(recipe_file), "--out", str(run)]
    process = subprocess.Popen(
        [sys.executable, "megakd/train.py", *arguments, *settings(*SETS)],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # tests that run in the background inherit SIG_IGN
    )
    wait_for(lambda: len(checkpoint.available(run)) > 0, process)
    process.send_signal(signal.SIGINT)
    finished = finish(process)
    assert finished.code == 130, finished.out
    assert "interrupted" in finished.out
    assert "Traceback" not in finished.out
    saved = checkpoint.latest_valid(run, print)
    assert saved is not None
    step = checkpoint.load(saved)[0].step
    assert step < 100
    again = train(None, *arguments, sets=SETS)
    assert again.code == 0, again.err
    assert [row["step"] for row in rows(run)] == list(range(1, 101))
