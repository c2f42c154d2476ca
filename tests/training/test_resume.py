"""Going on with a run: from where, with what, and when it is refused. One rank, in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megakd.data.shards import ShardSet
from megakd.objectives.base import StepContext
from megakd.objectives.softmax import Softmax
from megakd.recipe import Data
from megakd.runtime import checkpoint, files
from megakd.runtime.exits import EXIT_NOT_FINITE, EXIT_SAVED, EXIT_USER_ERROR
from megakd.training.command import run_command
from support.runs import LAUNCHER_VARIABLES, curve, ds_config, rows, settings, train

STEPS = 8
SETTINGS = (f"optim.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=3")


@pytest.fixture(scope="module")
def undisturbed(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(recipe_file, "--out", run, sets=SETTINGS).code == 0
    return run


@pytest.fixture
def stopped(undisturbed: Path, tmp_path: Path) -> Path:
    """The run as a crash after step 7 would leave it: checkpoints 2 to 6, rows to 7."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(checkpoint.available(run)[-1])
    shutil.rmtree(run / "model")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    return run


def _names(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoint.available(run)]


def test_checkpoints_are_kept_as_many_as_the_recipe_says_and_the_last_step_is_one(undisturbed: Path) -> None:
    assert _names(undisturbed) == [4, 6, 8]


def test_the_same_command_goes_on_from_the_newest_checkpoint(recipe_file: Path, stopped: Path, undisturbed: Path) -> None:
    finished = train(recipe_file, "--out", stopped, sets=SETTINGS)
    assert finished.code == 0, finished.err
    assert "step_00000006" in finished.out
    assert curve(stopped) == curve(undisturbed)


class Fading(Softmax):
    """Weighs the contrastive loss by what it remembers of the steps before."""

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        losses = super().__call__(context)
        weight = self.state.get("weight", torch.ones((), device=context.student.image.device))
        self.state["weight"] = 0.9 * weight + 0.01 * losses["contrastive"].detach()
        return {name: weight * loss for name, loss in losses.items()}


def test_an_objective_that_remembers_goes_on_with_what_it_remembered(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megakd.objectives.softmax.Softmax", Fading)
    run, sets = tmp_path / "run", ("optim.steps=4", "checkpoint.every=2")
    assert train(recipe_file, "--out", run, sets=sets).code == 0
    whole = curve(run)
    last = checkpoint.available(run)[-1]
    assert (last / "objectives.safetensors").is_file()
    shutil.rmtree(last)
    finished = train(recipe_file, "--out", run, sets=sets)
    assert finished.code == 0, finished.err
    assert "step 2 of 4" in finished.out
    assert curve(run) == whole


def test_a_finished_run_is_not_trained_again(recipe_file: Path, undisturbed: Path) -> None:
    before = curve(undisturbed)
    finished = train(recipe_file, "--out", undisturbed, sets=SETTINGS)
    assert finished.code == 0
    assert "step 8 of 8" in finished.out
    assert curve(undisturbed) == before


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_taken(recipe_file: Path, stopped: Path, undisturbed: Path) -> None:
    (checkpoint.available(stopped)[-1] / "weights.safetensors").write_bytes(b"damaged")
    finished = train(recipe_file, "--out", stopped, sets=SETTINGS)
    assert finished.code == 0, finished.err
    assert "passing over a damaged checkpoint" in finished.out
    assert "step_00000004: step 4 of 8" in finished.out
    assert curve(stopped) == curve(undisturbed)
    assert (stopped / "previous" / "1" / "step_00000006").is_dir()


def test_a_run_that_died_before_its_first_checkpoint_starts_over_with_a_clean_curve(
    recipe_file: Path, stopped: Path, undisturbed: Path
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    finished = train(recipe_file, "--out", stopped, sets=SETTINGS)
    assert finished.code == 0, finished.err
    assert curve(stopped) == curve(undisturbed)


def test_a_chosen_checkpoint_is_taken_and_newer_ones_are_set_aside(recipe_file: Path, stopped: Path, undisturbed: Path) -> None:
    chosen = checkpoint.available(stopped)[0]
    finished = train(recipe_file, "--out", stopped, "--resume", chosen, sets=SETTINGS)
    assert finished.code == 0, finished.err
    assert "step 4 of 8" in finished.out
    assert curve(stopped) == curve(undisturbed)
    assert (stopped / "previous" / "1" / "step_00000006").is_dir()


def test_a_chosen_checkpoint_may_lie_in_another_run(recipe_file: Path, stopped: Path, undisturbed: Path, tmp_path: Path) -> None:
    finished = train(recipe_file, "--out", tmp_path / "branch", "--resume", checkpoint.available(stopped)[-1], sets=SETTINGS)
    assert finished.code == 0, finished.err
    assert curve(tmp_path / "branch") == curve(undisturbed)[6:]


def test_resume_none_sets_the_earlier_run_aside_and_starts_over(recipe_file: Path, stopped: Path, undisturbed: Path) -> None:
    finished = train(recipe_file, "--out", stopped, "--resume", "none", sets=SETTINGS)
    assert finished.code == 0, finished.err
    assert curve(stopped) == curve(undisturbed)
    assert (stopped / "previous" / "1" / "run.json").is_file()
    assert (stopped / "previous" / "1" / "checkpoints" / "step_00000006").is_dir()


def test_another_recipe_in_the_folder_is_refused_with_the_keys_that_differ(recipe_file: Path, stopped: Path) -> None:
    before = curve(stopped)
    finished = train(recipe_file, "--out", stopped, sets=(*SETTINGS, "optim.lr=0.5", "seed=1"))
    assert finished.code == EXIT_USER_ERROR
    assert "optim.lr: 0.001 -> 0.5" in finished.err
    assert "seed: 0 -> 1" in finished.err
    assert "--resume none" in finished.err
    assert curve(stopped) == before


def test_how_it_is_watched_may_change(recipe_file: Path, stopped: Path, undisturbed: Path) -> None:
    finished = train(recipe_file, "--out", stopped, sets=(*SETTINGS, "checkpoint.every=3", "data.workers=1", "checkpoint.keep=1"))
    assert finished.code == 0, finished.err
    assert curve(stopped) == curve(undisturbed)
    assert _names(stopped) == [8]


def test_a_constant_schedule_takes_more_steps_and_learns_what_it_would_have_with_them_from_the_start(
    recipe_file: Path, tmp_path: Path
) -> None:
    sets = ("optim.schedule=constant", "checkpoint.every=100")
    for run, steps in (("longer", 4), ("longer", 6), ("whole", 6)):
        finished = train(recipe_file, "--out", tmp_path / run, sets=(*sets, f"optim.steps={steps}"))
        assert finished.code == 0, finished.err
        assert ("optim.steps: 4 -> 6: with a constant schedule" in finished.out) == ((run, steps) == ("longer", 6))
    assert curve(tmp_path / "longer") == curve(tmp_path / "whole")
    fewer = train(recipe_file, "--out", tmp_path / "longer", sets=(*sets, "optim.steps=3"))
    assert fewer.code == EXIT_USER_ERROR
    assert "optim.steps = 3: " in fewer.err
    assert "has 6 steps behind it" in fewer.err


def test_a_lower_rate_may_follow_a_divergence_and_is_said(recipe_file: Path, stopped: Path) -> None:
    finished = train(recipe_file, "--out", stopped, sets=(*SETTINGS, "optim.lr=1e-4"))
    assert finished.code == 0, finished.err
    assert "the recipe has changed since this run began: optim.lr: 0.001 -> 0.0001: from the step that is gone on from" in finished.out
    assert rows(stopped)[-1]["step"] == STEPS


def test_shards_that_have_moved_are_the_same_data(recipe_file: Path, stopped: Path, undisturbed: Path, world: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(world)
    finished = train(recipe_file, "--out", stopped, sets=(*SETTINGS, f"data.train={tmp_path}/elsewhere/train/*.tar"))
    assert finished.code == 0, finished.err
    assert curve(stopped) == curve(undisturbed)


def test_checkpoints_without_a_run_json_are_gone_on_with_and_it_is_said(recipe_file: Path, stopped: Path, undisturbed: Path) -> None:
    (stopped / "run.json").unlink()
    finished = train(recipe_file, "--out", stopped, sets=SETTINGS)
    assert finished.code == 0, finished.err
    assert "run.json is missing" in finished.out
    assert curve(stopped) == curve(undisturbed)


def test_what_a_kill_left_half_written_is_cleared_and_said_once(recipe_file: Path, stopped: Path) -> None:
    for folder in (stopped / ".model.partial", stopped / "checkpoints" / ".step_00000008.partial", stopped / "checkpoints" / ".removed_x"):
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"half")
    (stopped / ".run.json.partial").write_text("{")
    finished = train(recipe_file, "--out", stopped, sets=SETTINGS)
    assert finished.code == 0, finished.err
    assert finished.out.count("cleared what an earlier start had half written") == 1
    assert list(stopped.rglob(".*")) == []
    assert "cleared" not in train(recipe_file, "--out", stopped, sets=SETTINGS).out


def test_a_checkpoint_of_another_seed_has_another_order_of_the_data(recipe_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    path = checkpoint.available(undisturbed)[-1]
    finished = train(recipe_file, "--out", tmp_path / "run", "--resume", path, sets=(*SETTINGS, "seed=5"))
    assert finished.code == EXIT_USER_ERROR
    assert "seed = 5: " in finished.err
    assert "--set seed=0" in finished.err


def test_another_stage_may_go_on(recipe_file: Path, stopped: Path, undisturbed: Path, tmp_path: Path) -> None:
    config = ds_config(tmp_path / "stage3.json", zero_optimization={"stage": 3})
    assert train(recipe_file, "--out", stopped, "--ds_config", config, sets=SETTINGS).code == 0
    for mine, theirs in zip(curve(stopped), curve(undisturbed), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_shards_that_changed_since_are_refused(recipe_file: Path, stopped: Path, world: Path) -> None:
    text = (stopped / "run.json").read_text()
    (stopped / "run.json").write_text(text.replace("train/*.tar", "train/0000[01].tar"))
    finished = train(recipe_file, "--out", stopped, sets=(*SETTINGS, f"data.train={world}/train/0000[01].tar"))
    assert finished.code == EXIT_USER_ERROR
    assert "the data have changed" in finished.err
    assert "data.train" in finished.err
    assert _names(stopped) == [4, 6]


def test_shards_whose_content_changed_under_the_same_names_are_refused(
    recipe_file: Path, stopped: Path, world: Path, tmp_path: Path
) -> None:
    for shard in sorted((world / "train").glob("*.tar")):
        (tmp_path / "train").mkdir(exist_ok=True)
        content = bytearray(shard.read_bytes())
        place = content.index(b"a ", content.index(b".txt"))  # a caption's first word
        content[place : place + 1] = b"A"
        (tmp_path / "train" / shard.name).write_bytes(content)
    finished = train(recipe_file, "--out", stopped, sets=(*SETTINGS, f"data.train={tmp_path}/train/*.tar"))
    assert finished.code == EXIT_USER_ERROR
    assert "the data have changed" in finished.err


def test_a_checkpoint_that_knows_its_shards_by_name_alone_goes_on_and_says_so(
    recipe_file: Path, stopped: Path, undisturbed: Path, world: Path
) -> None:
    """As versions wrote them whose signature did not cover the content."""
    patterns = f"{world}/train/*.tar"
    earlier = ShardSet.open_set(patterns, Data(train=patterns), 0, 1, lambda: None).signature_of_names
    for state in stopped.glob("checkpoints/*/state.json"):
        content = {**json.loads(state.read_text()), "data": earlier}
        del content["sha256"]
        state.write_text(json.dumps({**content, "sha256": files.json_sha256(content)}))
    finished = train(recipe_file, "--out", stopped, sets=SETTINGS)
    assert finished.code == 0, finished.err
    assert "knows its shards by name and length alone" in finished.out
    assert curve(stopped) == curve(undisturbed)


def test_a_checkpoint_of_another_architecture_is_refused_with_the_tensors(recipe_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    path = checkpoint.available(undisturbed)[-1]
    finished = train(recipe_file, "--out", tmp_path / "run", "--resume", path, sets=(*SETTINGS, "student.architecture.embed_dim=8"))
    assert finished.code == EXIT_USER_ERROR
    assert "another architecture" in finished.err
    assert str(path) in finished.err
    assert "(32, 8) here, (32, 16) in the checkpoint" in finished.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on_as_if_nothing_had_been(
    recipe_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    sets = ("optim.steps=120", "checkpoint.every=1000")
    run = tmp_path / "run"

    def strike() -> None:
        while len(rows(run)) < 5:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    finished = train(recipe_file, "--out", run, sets=sets)
    thread.join()
    assert finished.code == EXIT_SAVED, finished.err
    last = rows(run)[-1]["step"]
    assert 5 <= last < 120
    assert _names(run) == [last]
    assert train(recipe_file, "--out", run, sets=sets).code == 0
    assert train(recipe_file, "--out", tmp_path / "whole", sets=sets).code == 0
    assert curve(run) == curve(tmp_path / "whole")


def test_a_program_that_runs_the_command_gets_the_code_back_and_its_own_signal_handler(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As submitit's task does: no SystemExit, and a signal after the run is the caller's."""
    heard: list[int] = []
    earlier = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    run = tmp_path / "run"

    def strike() -> None:
        while len(rows(run)) < 2:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGUSR2)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        assert run_command(["--recipe", str(recipe_file), "--out", str(run), *settings("optim.steps=1000")]) == EXIT_SAVED
        thread.join()
        assert heard == []
        signal.raise_signal(signal.SIGUSR2)
        assert heard == [signal.SIGUSR2]
        assert run_command(["--no_such_flag"]) == EXIT_USER_ERROR
        assert run_command(["--help"]) == 0
    finally:
        signal.signal(signal.SIGUSR2, earlier)
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
    assert "--no_such_flag" in capsys.readouterr().err


def test_the_console_begins_with_the_run_folder_and_the_job_and_run_json_lists_every_start(
    recipe_file: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "4711", "JOB_NODELIST": "gpu1", "RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    earlier = json.loads((stopped / "run.json").read_text())["jobs"]
    finished = train(recipe_file, "--out", stopped, sets=SETTINGS)
    assert finished.code == 0, finished.err
    assert finished.out.splitlines()[0] == f"tiny: run folder {stopped}, SLURM job 4711, restart 2"
    content = json.loads((stopped / "run.json").read_text())
    assert content["slurm_job_id"] == "4711"
    assert content["jobs"][:-1] == earlier
    assert (earlier[0]["slurm_job_id"], content["jobs"][-1]["slurm_job_id"], content["jobs"][-1]["restarts"]) == (None, "4711", 2)


def test_the_stacks_of_a_hang_are_set_aside_when_the_run_goes_on(recipe_file: Path, stopped: Path) -> None:
    (stopped / "hung").mkdir()
    (stopped / "hung" / "rank_00003.txt").write_text("stacks")
    assert train(recipe_file, "--out", stopped, sets=(*SETTINGS, "watchdog.limit=900")).code == 0
    assert not (stopped / "hung").exists()
    assert (stopped / "previous" / "1" / "hung" / "rank_00003.txt").read_text() == "stacks"


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(recipe_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    _, weights = checkpoint.load_weights(checkpoint.available(undisturbed)[-1])
    clip = {name.removeprefix("clip."): value for name, value in weights.items() if name.startswith("clip.")}
    clip["logit_scale"] = torch.tensor(100.0)  # a number as others, whose exponential is infinite in float32
    save_file(clip, tmp_path / "poisoned.safetensors")
    sets = (*SETTINGS, "student.max_scale=1e300", f"student.pretrained={tmp_path}/poisoned.safetensors")
    finished = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert finished.code == EXIT_NOT_FINITE, finished.err
    assert "step 1: the loss is not finite" in finished.err
    assert "Traceback" not in finished.err
    assert checkpoint.available(tmp_path / "run") == []


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_that_diverges_leaves_a_finite_checkpoint(recipe_file: Path, tmp_path: Path, stage: int) -> None:
    config = ds_config(tmp_path / "z.json", zero_optimization={"stage": stage})
    sets = ("optim.lr=1e38", "optim.warmup=0", "optim.steps=20", "checkpoint.every=1", "optim.clip=0.0")
    finished = train(recipe_file, "--out", tmp_path / "run", "--ds_config", config, sets=sets)
    assert finished.code == EXIT_NOT_FINITE, finished.err
    assert "optim.lr" in finished.err
    for path in checkpoint.available(tmp_path / "run"):
        state = checkpoint.load(path)[1]
        assert all(bool(value.isfinite().all()) for value in (*state.weights.values(), *state.moments.values())), path
