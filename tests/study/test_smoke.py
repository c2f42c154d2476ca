"""The whole smoke jobs, as `make smoke` and `megakd smoke --vqa` run them: minutes, so behind `make test-slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megakd.recipe import load
from megakd.study import launcher
from megakd.study.recipes import Recipes
from megakd.study.smoke_vqa import ROWS, recipe_of
from megakd.training.prepare import RunRequest, prerequisites


def test_the_recipe_of_a_vqa_row_names_all_runs_that_come_before_it(tmp_path: Path) -> None:
    recipes = Recipes(tmp_path / "out", tmp_path / "world")
    found = {}
    for row in ROWS:
        recipe, folder = recipe_of(row, 1, recipes)
        loaded, name = load.load(recipe)
        assert loaded.answers is not None
        assert str(loaded.answers.train["shapes"].questions).startswith(f"{tmp_path}/world/questions/")
        found[row] = [first.out.name for first in prerequisites(RunRequest(loaded, name, None, folder))]
    assert found == {
        "blind": ["decoder"],
        "random tower": ["teacher", "decoder", "random_tower_seed1_align"],
        "student, no KD": ["no_kd_seed1", "decoder", "student_no_KD_seed1_align"],
        "student, KD": ["teacher", "kd_seed1", "decoder", "student_KD_seed1_align"],
        "teacher's tower": ["teacher", "decoder", "teachers_tower_seed1_align"],
    }


def test_every_file_of_a_shipped_recipe_is_taken_from_another_data_folder(tmp_path: Path) -> None:
    data = tmp_path / "a world"
    for name in load.shipped():
        before = json.dumps(load.load_recipe(name).model_dump(mode="json"))
        after = load.load_recipe(name, launcher.moved(name, data)).model_dump(mode="json")
        assert after == json.loads(before.replace('"data/shapes/', f'"{data}/')), name
    assert launcher.moved("smoke", Path("data/shapes")) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_smoke_table_shows_the_student_with_kd_ahead(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("megakd")), "smoke", "--out", str(tmp_path / "runs"), "--data", str(tmp_path / "data")]
    subprocess.run(command, check=True, cwd=tmp_path)
    teacher, with_kd, without = json.loads((tmp_path / "runs" / "table.json").read_text())["rows"]
    assert teacher["runs"][0]["zero_shot"] > 0.5
    for measure in ("zero_shot", "mean_R@1"):
        assert with_kd["runs"][0][measure] > without["runs"][0][measure] + 0.1, measure
    again = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "there already" in again
    assert "resuming from" in again


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_vqa_table_orders_the_vision_towers(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("megakd")), "smoke", "--vqa"]
    subprocess.run([*command, "--out", str(tmp_path / "runs"), "--data", str(tmp_path / "data")], check=True, cwd=tmp_path)
    rows = json.loads((tmp_path / "runs" / "table.json").read_text())["rows"]
    overall = {name: runs[0]["test"]["accuracy"] for name, runs in rows.items()}
    assert overall["random tower"] > overall["blind"] + 0.01
    for trained in ("student, KD", "teacher's tower"):
        assert overall[trained] > overall["random tower"] + 0.02, trained
