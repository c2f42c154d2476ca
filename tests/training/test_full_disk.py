"""A disk that fills: every rank ends with one message, the last checkpoint stays valid, and with room the same command goes on.

The disk is a small tmpfs; a single file that cannot be written is a link to /dev/full, which answers as a full disk does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megakd.runtime import checkpoint
from megakd.runtime.exits import EXIT_USER_ERROR
from support.runs import REPOSITORY, curve, environment, finish, rows, settings, start_ranks, train

STEPS, EVERY = 60, 10
pytestmark = pytest.mark.timeout(600)


@dataclass
class Start:
    """One start of two ranks: exit code and output by rank, and the steps whose checkpoints it left."""

    codes: list[int]
    out: list[str]
    saved: list[int]


@dataclass
class Story:
    undisturbed: Path
    disturbed: Path
    starts: list[Start] = field(default_factory=list)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    disk = tmp_path_factory.mktemp("small") / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk ({mounted.stderr.strip()})")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def story(recipe_file: Path, small_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The disk fills with checkpoints, is enlarged, refuses metrics.jsonl alone, and then has room."""
    found = Story(tmp_path_factory.mktemp("roomy") / "run", small_disk / "run")

    def start(run: Path, meanwhile: Callable[[], None] = lambda: None) -> Start:
        sets = (f"optim.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=9")
        ranks = start_ranks("--recipe", recipe_file, "--out", run, *settings(*sets))
        try:
            meanwhile()
        finally:
            ended = [finish(rank) for rank in ranks]
        return Start([end.code for end in ended], [end.out for end in ended], _saved(run))

    found.starts.append(start(found.undisturbed))
    found.starts.append(start(found.disturbed))
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    metrics, kept = found.disturbed / "metrics.jsonl", found.disturbed / "kept"
    before = found.starts[1].saved[-1]

    def fill() -> None:
        end = time.monotonic() + 240
        while len(_jobs(found.disturbed)) < 2 or len(rows(found.disturbed)) < before + 3:
            assert time.monotonic() < end, "it hangs: this says nothing of how fast it is"
            time.sleep(0.01)
        os.link(metrics, kept)  # what is written meanwhile is in both
        (found.disturbed / "full").symlink_to("/dev/full")
        (found.disturbed / "full").replace(metrics)

    found.starts.append(start(found.disturbed, fill))
    kept.replace(metrics)
    found.starts.append(start(found.disturbed))
    return found


def _jobs(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "run.json").read_text())["jobs"])


def _saved(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint.available(run)]


def test_a_checkpoint_that_does_not_fit_ends_every_rank_with_one_message_and_the_code_of_mistakes(story: Story) -> None:
    assert story.starts[1].codes == [EXIT_USER_ERROR] * 2, story.starts[1].out
    for out in story.starts[1].out:
        assert "could not save" in out
        assert "No space left" in out
        assert "Traceback" not in out
    assert 0 < story.starts[1].saved[-1] < STEPS


def test_metrics_that_cannot_be_written_by_rank_0_end_every_rank_as_well(story: Story) -> None:
    assert story.starts[2].codes == [EXIT_USER_ERROR] * 2, story.starts[2].out
    for out in story.starts[2].out:
        assert f"No space left on device: '{story.disturbed}/metrics.jsonl'; make room there" in out
        assert "Traceback" not in out
    assert "[rank 1]" in story.starts[2].out[1]


def test_with_room_the_same_command_goes_on_to_the_same_bits(story: Story) -> None:
    assert [start.codes for start in (story.starts[0], story.starts[-1])] == [[0, 0], [0, 0]], story.starts[-1].out
    assert [row["step"] for row in rows(story.disturbed)] == list(range(1, STEPS + 1))
    assert curve(story.disturbed) == curve(story.undisturbed)
    mine, theirs = (checkpoint.available(run)[-1] for run in (story.disturbed, story.undisturbed))
    for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.parametrize("name", ["run.json", "evaluation.json"])
def test_any_file_of_the_run_that_finds_no_room_is_named_and_the_command_goes_on_later(
    recipe_file: Path, evaluations: tuple[str, ...], tmp_path: Path, name: str
) -> None:
    run, partial = tmp_path / "run", tmp_path / "run" / f".{name}.partial"
    run.mkdir()
    partial.symlink_to("/dev/full")
    finished = train(recipe_file, "--out", run, sets=evaluations)
    assert finished.code == EXIT_USER_ERROR, finished.err
    assert f"No space left on device: '{run / name}'; make room there" in finished.err
    assert "Traceback" not in finished.err
    partial.unlink()
    assert train(recipe_file, "--out", run, sets=evaluations).code == 0
    assert train(recipe_file, "--out", tmp_path / "whole", sets=evaluations).code == 0
    assert curve(run) == curve(tmp_path / "whole")


def test_a_log_on_the_full_disk_leaves_the_exit_code(recipe_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "megakd/train.py", "--recipe", str(recipe_file), "--out", str(tmp_path / "run")]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, cwd=REPOSITORY, env=environment(), stdout=full, stderr=full, check=False, timeout=240)
    assert ended.returncode == EXIT_USER_ERROR
