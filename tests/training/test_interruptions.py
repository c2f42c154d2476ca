"""Two ranks under deepspeed and torchrun, signalled and killed, against a run that nobody disturbed: the same curve to the last bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megakd.runtime import checkpoint
from megakd.runtime.exits import EXIT_SAVED
from support.runs import REPOSITORY, Finished, curve, environment, finish, launch, rank_process, rows, settings, start_ranks, wait_for

STEPS = 60  # which leaves many after the last strike: a run that has ended cannot be struck
SETTINGS = (
    f"optim.steps={STEPS}",
    "checkpoint.every=4",
    "data.workers=1",
    "student.architecture.vision_cfg.patch_dropout=0.5",  # random numbers in the step, which a resumed run must draw again
    "teacher.architecture={ embed_dim = 24, vision_cfg = { image_size = 48, patch_size = 16, width = 32, layers = 1, head_width = 16 }, "
    "text_cfg = { context_length = 24, width = 32, heads = 2, layers = 1 } }",
    "teacher.pretrained=random",
    "objectives.similarity=1.0",
)

pytestmark = pytest.mark.timeout(600)


@dataclass
class Story:
    """What happened to the disturbed run: the ends of its lives, and at which row and rank each was struck."""

    undisturbed: Path
    disturbed: Path
    ends: list[Finished] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    rows_after_signal: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("interrupted")
    found = Story(folder / "undisturbed", folder / "disturbed")

    def arguments(out: Path) -> list[str | Path]:
        config = REPOSITORY / "ds_configs" / "zero2_bf16.json"
        return ["--recipe", recipe_file, "--ds_config", config, "--out", out, *settings(*SETTINGS)]

    def whole(out: Path) -> Finished:
        """A life that nothing ends; without a launcher, whose start takes longer than the training."""
        first, second = [finish(rank) for rank in start_ranks(*arguments(out))]
        assert first.code == second.code == 0, first.out[-4000:] + second.out[-4000:]
        return first

    whole(found.undisturbed)

    def strike(starter: str, at_row: int, rank: int, number: int) -> None:
        before = len(rows(found.disturbed))
        launcher = launch(starter, "megakd/train.py", *arguments(found.disturbed))
        try:
            wait_for(lambda: len(rows(found.disturbed)) > before, launcher)  # a row of this life: its ranks are there
            struck = rank_process(launcher, rank)
            wait_for(lambda: len(rows(found.disturbed)) >= at_row, launcher)
            time.sleep(random.uniform(0, 0.05))
            struck.send_signal(number)
            found.struck.append(f"signal {number} to rank {rank} in row {len(rows(found.disturbed))}")
        finally:
            found.ends.append(finish(launcher))

    strike("deepspeed", random.randint(3, 8), 1, signal.SIGUSR2)
    found.rows_after_signal = [row["step"] for row in rows(found.disturbed)]
    strike("deepspeed", random.randint(12, 20), 1, signal.SIGKILL)
    strike("torchrun", random.randint(22, 32), 0, signal.SIGKILL)
    found.ends.append(whole(found.disturbed))
    return found


def test_a_signal_to_one_rank_stops_all_after_a_save_with_the_documented_code(story: Story) -> None:
    end = story.ends[0]
    assert end.code == EXIT_SAVED, end.out[-4000:]
    assert "stopped by a signal after saving" in end.out
    assert "Traceback" not in end.out


def test_the_save_is_at_the_step_where_it_stopped(story: Story) -> None:
    assert 0 < story.rows_after_signal[-1] < STEPS
    assert f"step_{story.rows_after_signal[-1]:08d}" in story.ends[1].out


def test_a_killed_rank_ends_its_launcher(story: Story) -> None:
    assert all(end.code != 0 for end in story.ends[1:3])


def test_the_same_command_again_goes_on_each_time(story: Story) -> None:
    assert story.ends[-1].code == 0, story.ends[-1].out[-4000:]
    assert all("resuming from" in end.out for end in story.ends[1:])


def test_the_loss_curve_is_bitwise_that_of_an_undisturbed_run(story: Story) -> None:
    assert [row["step"] for row in rows(story.undisturbed)] == list(range(1, STEPS + 1))
    assert curve(story.disturbed) == curve(story.undisturbed), story.struck


def test_the_last_weights_and_moments_are_bitwise_those_of_an_undisturbed_run(story: Story) -> None:
    mine, theirs = (checkpoint.available(run)[-1] for run in (story.disturbed, story.undisturbed))
    for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes(), (name, story.struck)


def test_a_signal_that_comes_while_the_program_starts_is_obeyed_after_the_first_step(recipe_file: Path, tmp_path: Path) -> None:
    """SLURM's SIGUSR1 would end the process there, and with it a job that was to be requeued."""
    command = [sys.executable, str(REPOSITORY / "megakd" / "train.py"), "--recipe", str(recipe_file), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    status, bit = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGUSR1 - 1)
    wait_for(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) & bit != 0, process)
    assert not (tmp_path / "run").exists()
    process.send_signal(signal.SIGUSR1)
    finished = finish(process)
    assert finished.code == EXIT_SAVED, finished.out
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]
