"""The training program as people start it: its flags, what it says, what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megakd.recipe import load as recipes
from megakd.runtime.exits import EXIT_SAVED, EXIT_USER_ERROR
from megakd.training import command
from support.runs import REPOSITORY, ds_config, rows, settings, train


def test_the_flags_are_these_and_no_more() -> None:
    flags = {option for action in command.parser()._actions for option in action.option_strings}
    assert flags == {"--recipe", "--ds_config", "--out", "--resume", "--set", "--dry_run", "--local_rank", "-h", "--help"}


def test_the_documented_exit_codes_stay() -> None:
    assert (EXIT_USER_ERROR, EXIT_SAVED, command.EXIT_NOT_FINITE) == (2, 85, 86)


def test_a_bare_command_runs_the_smoke_recipe_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the smoke recipe's data is not
    finished = train(None)
    assert "no --recipe given: running the shipped recipe 'smoke'" in finished.out
    assert finished.code == EXIT_USER_ERROR
    assert "data/shapes" in finished.err


def test_a_run_leaves_what_the_readme_says(recipe_file: Path, tmp_path: Path) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", "--local_rank", "0", sets=("optim.steps=3",))
    assert finished.code == 0, finished.err
    found = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert found == {"run.json", "metrics.jsonl", "checkpoints", "model", "lock"}
    assert recipes.load(str(tmp_path / "run" / "run.json"))[0].optim.steps == 3


HOLDER = """
import sys
from pathlib import Path
from megakd.runtime.locks import FolderLock
with FolderLock(Path(sys.argv[1]), doing="is at work", remedy="wait"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_job_on_a_run_folder_is_refused_and_a_dead_one_holds_nothing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megakd.training.run.LOCK_SECONDS", 0.0)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = train(recipe_file, "--out", tmp_path / "run", sets=("optim.steps=3",))
        assert refused.code == EXIT_USER_ERROR
        assert f"{tmp_path / 'run'}: process {holder.pid} on " in refused.err
        assert "is at work on this run now; end it first, or choose another --out" in refused.err
        assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["lock"]
        holder.kill()
    assert train(recipe_file, "--out", tmp_path / "run", sets=("optim.steps=3",)).code == 0


def test_a_row_holds_what_people_ask_for(recipe_file: Path, tmp_path: Path) -> None:
    sets = (
        "optim.steps=4",
        "teacher.model=ViT-B-32",
        "teacher.pretrained=random",
        "log.every=2",
    )
    finished = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert finished.code == 0, finished.err
    assert "the teacher is not loaded: no objective with a positive weight uses it" in finished.out
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 4]
    for row in rows(tmp_path / "run"):
        assert row.keys() >= {"loss", "losses", "lr", "scale", "gradient_norm", "images_per_second", "memory_gb", "seconds", "bad_samples"}
        assert row["seconds"].keys() >= {"data", "teacher", "student"}
        assert row["images_per_second"] > 0
    for line in ("step 2/4", "step 4/4"):
        assert line in finished.out
    for word in ("loss", "contrastive", "images/s", "lr", "scale", "GB", "data", "teacher", "student"):
        assert word in finished.out


def test_a_run_json_runs_again_to_the_same_losses(recipe_file: Path, tmp_path: Path) -> None:
    assert train(recipe_file, "--out", tmp_path / "first", sets=("optim.steps=3", "seed=5", "views.preset=timm")).code == 0
    assert train(tmp_path / "first" / "run.json", "--out", tmp_path / "second").code == 0
    assert [row["loss"] for row in rows(tmp_path / "second")] == [row["loss"] for row in rows(tmp_path / "first")]


def test_a_dry_run_shows_everything_and_leaves_nothing(recipe_file: Path, evaluations: tuple[str, ...], tmp_path: Path) -> None:
    config = ds_config(tmp_path / "z.json", zero_optimization={"stage": 2}, train_batch_size="auto", train_micro_batch_size_per_gpu=4)
    sets = (*evaluations, "teacher.model=ViT-B-32", "teacher.pretrained=random", "objectives.feature=1.0", "views.blur={probability=0.5}")
    finished = train(recipe_file, "--out", tmp_path / "run", "--ds_config", config, "--dry_run", sets=sets)
    assert finished.code == 0, finished.err
    for words in ('"gradient_accumulation_steps": 4', '"batch": 16', "600 samples in 3 shards", "dry run: all of this is sound"):
        assert words in finished.out
    assert "augmentation: crop_scale [0.5, 1.0], crop_ratio [0.75, 1.3333333333333333], flip 0.5; blur: probability 0.5" in finished.out
    assert "student: " in finished.out
    assert "pixels (3, 32, 32) -> (16,), tokens (32,) -> (16,)" in finished.out
    assert "pixels (3, 224, 224) -> (512,), tokens (77,) -> (512,)" in finished.out
    assert not (tmp_path / "run").exists()


def test_a_teachers_recipe_is_trained_first_and_once(recipe_file: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.toml"
    teacher.write_text(recipe_file.read_text().replace('name = "tiny"', 'name = "tiny_teacher"').replace("steps = 6", "steps = 4"))
    sets = (f"teacher={{ model = 'local-dir:{tmp_path}/taught/model', recipe = '{teacher}' }}", "objectives.similarity=1.0")
    dry = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=sets)
    assert f"would run first: {teacher} into {tmp_path}/taught" in dry.out
    first = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert first.code == 0, first.err
    assert "not there yet" in first.out
    assert [row["step"] for row in rows(tmp_path / "taught")] == [1, 2, 3, 4]
    assert rows(tmp_path / "run")[-1]["losses"].keys() == {"contrastive", "similarity"}
    second = train(recipe_file, "--out", tmp_path / "again", sets=sets)
    assert second.code == 0
    assert "not there yet" not in second.out
    assert [row["loss"] for row in rows(tmp_path / "again")] == [row["loss"] for row in rows(tmp_path / "run")]


@pytest.mark.parametrize("monitor", ["csv_monitor", "tensorboard"])
def test_a_monitor_of_the_json_gets_the_losses(recipe_file: Path, tmp_path: Path, monitor: str) -> None:
    config = ds_config(tmp_path / "z.json", **{monitor: {"enabled": True, "output_path": f"{tmp_path}/watched", "job_name": "tiny"}})
    finished = train(recipe_file, "--out", tmp_path / "run", "--ds_config", config, sets=("optim.steps=4",))
    assert finished.code == 0, finished.err
    written = [path for path in (tmp_path / "watched").rglob("*") if path.is_file()]
    assert written
    if monitor == "csv_monitor":
        (losses,) = [path for path in written if path.name.endswith("Train_loss.csv")]
        lines = losses.read_text().splitlines()[1:]
        assert [float(line.split(",")[1]) for line in lines] == pytest.approx([row["loss"] for row in rows(tmp_path / "run")])
        assert [int(line.split(",")[0]) for line in lines] == [16, 32, 48, 64]


def test_settings_reach_the_run_and_its_json(recipe_file: Path, tmp_path: Path) -> None:
    assert command.parser().parse_args(settings("a=1", "b=2")).overrides == ["a=1", "b=2"]
    path = ds_config(tmp_path / "clip.json", gradient_clipping="auto")
    assert train(recipe_file, "--out", tmp_path / "run", "--ds_config", path, sets=("optim.clip=0.25", "optim.steps=3")).code == 0
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["ds_config"]["gradient_clipping"] == 0.25
    assert content["recipe"]["optim"]["clip"] == 0.25
