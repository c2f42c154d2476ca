"""DeepSpeed's monitors hold each step of a run once, also when the run goes on; and a folder that not all ranks see is found."""

from __future__ import annotations

import csv
import os
import shutil
import socket
from collections import Counter
from pathlib import Path

import pytest

from megakd.runtime import checkpoint, monitors
from support.runs import ds_config, run_ranks, train

SETS = ("optim.steps=4", "checkpoint.every=2")


def _csv_steps(folder: Path) -> dict[str, list[str]]:
    return {path.stem: [row[0] for row in csv.reader(path.open())] for path in folder.glob("*.csv")}


def _event_steps(folder: Path) -> Counter[tuple[str, int]]:
    from tensorboard.compat.proto.event_pb2 import Event

    found: Counter[tuple[str, int]] = Counter()
    for path in folder.glob("events*"):
        for _, content in monitors._records(path.read_bytes()):
            event = Event.FromString(content)
            found.update((value.tag, event.step) for value in event.summary.value)
    return found


def test_a_run_that_goes_on_writes_no_step_twice(recipe_file: Path, tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "x"}
    config = ds_config(tmp_path / "m.json", csv_monitor=section, tensorboard={**section, "job_name": "t"})
    run = tmp_path / "run"
    assert train(recipe_file, "--out", run, "--ds_config", config, sets=SETS).code == 0
    steps, events = _csv_steps(tmp_path / "x"), _event_steps(tmp_path / "t")
    assert steps["Train_loss"] == ["step", "16", "32", "48", "64"]
    assert events["Train/loss", 48] == 1
    # as a crash after step 4, before its checkpoint, leaves it
    shutil.rmtree(checkpoint.available(run)[-1])
    shutil.rmtree(run / "model")
    finished = train(recipe_file, "--out", run, "--ds_config", config, sets=SETS)
    assert finished.code == 0, finished.err
    assert "step 2 of 4" in finished.out
    assert _csv_steps(tmp_path / "x") == steps
    assert _event_steps(tmp_path / "t") == events
    other = train(recipe_file, "--out", tmp_path / "other", "--ds_config", config, sets=SETS)
    assert other.code == 0, other.err
    assert f"is written to by another run, {run}" in other.out
    assert _csv_steps(tmp_path / "x")["Train_loss"][:5] == steps["Train_loss"]


def test_the_wandb_run_of_a_folder_keeps_its_id_and_another_folder_has_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    names = []
    for run in ("a", "b", "a"):
        (tmp_path / run).mkdir(exist_ok=True)
        monitors.go_on({"wandb": {"enabled": True}}, tmp_path / run, 0, evaluated=False)
        names.append(os.environ["WANDB_RUN_ID"])
    assert names[0] == names[2] != names[1]
    monkeypatch.setenv("WANDB_RUN_ID", "the user's")
    monitors.go_on({"wandb": {"enabled": True}}, tmp_path / "a", 0, evaluated=False)
    assert os.environ["WANDB_RUN_ID"] == "the user's"


RANK = """
import os, sys
from pathlib import Path
from megakd.runtime import launch, shared_folder
world = launch.start()
try:
    print(shared_folder.check(Path(sys.argv[1 + world.rank]), world, timeout=1.0), flush=True)
except ValueError as error:
    print(f"rank {world.rank} ends: {error}", flush=True)
launch.stop()
"""


@pytest.mark.timeout(300)
def test_a_run_folder_that_a_rank_does_not_see_is_one_message_on_every_rank(tmp_path: Path) -> None:
    """Two folders stand for two file systems."""
    program, one, two = tmp_path / "rank.py", tmp_path / "one", tmp_path / "two"
    program.write_text(RANK)
    one.mkdir()
    two.mkdir()
    assert [said.count("[]") for said in run_ranks(program, one, one)] == [1, 1]
    ends = run_ranks(program, one, two)
    for rank in (0, 1):
        assert f"rank {rank} ends: --out {one}: what rank 0 on " in ends[rank]
    assert f"is not seen by rank 1 on {socket.gethostname()} ({two})" in ends[0]
    assert [*one.iterdir(), *two.iterdir()] == []
