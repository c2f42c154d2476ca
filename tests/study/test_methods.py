"""The studies of objectives: cells, recipes and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megakd.recipe import Objectives, load
from megakd.runtime.run_folder import EVALUATION
from megakd.study import launcher, methods
from megakd.study.recipes import Recipes
from megakd.study.smoke_vqa import FAMILIES
from megakd.training.prepare import RunRequest, prerequisites


def test_every_objective_with_a_teacher_has_a_row(tmp_path: Path) -> None:
    """But the sigmoid ones, which need models with a logit bias."""
    used = {key.removeprefix("objectives.") for settings in methods.METHODS.values() for key in settings if key.startswith("objectives.")}
    assert used == set(Objectives.model_fields) - {"contrastive", "sigmoid_contrastive", "sigmoid_similarity"}


def test_a_readouts_recipe_names_student_teacher_and_decoder(tmp_path: Path) -> None:
    recipes = Recipes(tmp_path / "out", tmp_path / "world")
    teachers = {name: recipes.derive("smoke_teacher", f"teacher_{name}") for name in methods.TEACHERS}
    folders = set()
    for cell in methods.cells_of("methods", 1):
        student = methods.student_recipe(cell, recipes, teachers)
        recipe = recipes.readout(cell.readout, cell.seed, recipes.trained("student", cell.name, student))
        loaded, name = load.load(recipe)
        before = [first.out.name for first in prerequisites(RunRequest(loaded, name, None, recipes.out / cell.readout))]
        taught = [] if cell.method == methods.NO_KD else ["teacher_middle"]
        assert before == [*taught, cell.name, "decoder", f"{cell.readout}_align"]
        folders.add(cell.name)
    assert len(folders) == len(methods.METHODS)


def test_the_two_studies_share_cells() -> None:
    shared = set(methods.cells_of("methods", 3)) & set(methods.cells_of("patches", 3))
    assert shared == {methods.Cell(method, "middle", seed) for method in methods.WITH_PATCHES for seed in range(3)}


def test_an_unknown_study_is_refused() -> None:
    with pytest.raises(ValueError, match="no study is called everything: there are methods and patches"):
        methods.cells_of("everything", 1)


def _written(out: Path, cell: methods.Cell, vqa: float, own: float) -> None:
    for folder, scores in (
        (cell.name, {"zero_shot": {"seen": {"top1": own}}, "retrieval": {"test": {"mean_R@1": own}}}),
        (
            cell.readout,
            {
                "vqa": {
                    "test": {"accuracy": vqa, "by_family": {family: {"accuracy": vqa} for family in FAMILIES}},
                    "held_out": {"accuracy": vqa},
                }
            },
        ),
    ):
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / EVALUATION).write_text(json.dumps(scores))


def test_tables_of_finished_runs(tmp_path: Path) -> None:
    """Students of `similarity` follow their teachers, those with `patch` do not."""
    strength = {"weak": 0.1, "middle": 0.2, "strong": 0.3}
    cells = {study: methods.cells_of(study, 2) for study in ("methods", "patches")}
    for cell in (*cells["methods"], *cells["patches"]):
        value = strength[cell.teacher] * (-1 if cell.method == "similarity + patch" else 1) + 0.01 * cell.seed + 0.4
        _written(tmp_path, cell, 0.5 if cell.method == methods.NO_KD else value, 0.25)
    table = methods.write_table("methods", cells["methods"], tmp_path)
    assert len(table) == 2 + len(methods.METHODS)
    assert table[3].startswith("| similarity | 25.0% ± 0.0% | 25.0% ± 0.0% | 60.5% ± 0.7% | +10.0, +11.0 | 60.5% |")
    methods.write_table("patches", cells["patches"], tmp_path)
    said = (tmp_path / "patches.md").read_text()
    assert "Teachers by the VQA of their own towers: weak, middle, strong." in said
    assert "similarity: the student's VQA in that order is 50.5%, 60.5%, 70.5%: it rises with the teacher's (6 of 6 pairs" in said
    assert "similarity + patch: the student's VQA in that order is 30.5%, 20.5%, 10.5%: it does not rise with the teacher's (0 of 6" in said


def test_runs_that_have_scores_are_left_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / EVALUATION).write_text("{}")
    assert launcher.run_together([("no_such_recipe", tmp_path / "done")], 2) == []
    assert "1 of 1 runs are there already" in capsys.readouterr().out


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [(str(tmp_path / f"{name}.toml"), tmp_path / name) for name in ("one", "two")]
    assert sorted(launcher.run_together(wrong, 2)) == sorted(folder for _, folder in wrong)
    assert f"{tmp_path}/two failed with exit code 2, see {tmp_path}/two.log" in capsys.readouterr().out
    assert "two.toml" in (tmp_path / "two.log").read_text()
