"""The end of a run: results are written before they are scored, a failed evaluation costs none of them, and nothing is done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megakd.runtime import checkpoint
from megakd.runtime.exits import EXIT_USER_ERROR
from support.numbered_pictures import captioned
from support.runs import TINY_LLAMA, answering, ds_config, events, question_source, train
from support.shards import jpeg, write_tar


def _numbers(path: Path) -> dict[int, float]:
    rows = [line.split(",") for line in path.read_text().split() if not line.startswith("step")]
    return {int(step): float(value) for step, value in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture(scope="module")
def twice(recipe_file: Path, evaluations: tuple[str, ...], folder: Path) -> Any:
    """A run with a monitor, and the same command again."""
    config = ds_config(folder / "csv.json", csv_monitor={"enabled": True, "output_path": f"{folder}/csv", "job_name": "run"})
    sets = (*evaluations, "optim.steps=4", "evaluation.every=2")
    first = train(recipe_file, "--out", folder / "run", "--ds_config", config, sets=sets)
    assert first.code == 0, first.err
    before = _state(folder)
    second = train(recipe_file, "--out", folder / "run", "--ds_config", config, sets=sets)
    assert second.code == 0, second.err
    return first, second, before


def _state(folder: Path) -> dict[str, Any]:
    kept = [path for path in (folder / "run").rglob("*") if path.is_file() and path.name not in ("run.json", "lock")]
    return {str(path): path.read_bytes() for path in [*kept, *(folder / "csv").rglob("*.csv")]}


def test_a_finished_run_started_again_says_so_and_touches_nothing(twice: Any, folder: Path) -> None:
    first, second, before = twice
    assert "evaluation at step 4" in first.out
    assert "this run has ended before: its scores are in" in second.out
    assert "done: " in second.out
    assert "evaluation at step" not in second.out
    assert _state(folder) == before


def test_scores_go_to_the_monitors_by_their_names(twice: Any, folder: Path) -> None:
    scored = {event["step"]: event["content"] for event in events(folder / "run", "evaluation")}
    assert list(scored) == [2, 4]
    drawn = _numbers(folder / "csv" / "run" / "Evaluation_retrieval_test_image_to_text_R@5.csv")
    assert drawn == pytest.approx({step * 16: found["retrieval"]["test"]["image_to_text"]["R@5"] for step, found in scored.items()})
    drawn = _numbers(folder / "csv" / "run" / "Evaluation_zero_shot_seen_top1.csv")
    assert drawn == pytest.approx({step * 16: found["zero_shot"]["seen"]["top1"] for step, found in scored.items()})
    assert (folder / "csv" / "run" / "Train_loss.csv").is_file()


def test_scores_that_were_removed_are_written_again_without_scoring(twice: Any, folder: Path, recipe_file: Path, evaluations: Any) -> None:
    path = folder / "run" / "evaluation.json"
    before = path.read_text()
    path.unlink()
    sets = (*evaluations, "optim.steps=4", "evaluation.every=2")
    again = train(recipe_file, "--out", folder / "run", "--ds_config", folder / "csv.json", sets=sets)
    assert again.code == 0, again.err
    assert path.read_text() == before
    assert len(events(folder / "run", "evaluation")) == 2


def broken_later(folder: Path) -> str:
    """The first sample is sound, a later one has no class."""
    folder.mkdir()
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    _labels(folder, b"2")
    return str(folder)


def _labels(folder: Path, last: bytes) -> None:
    members = [member for row in range(4) for member in ((f"{row}.jpg", jpeg(row)), (f"{row}.cls", last if row == 3 else b"1"))]
    write_tar(folder / "test" / "0.tar", members)


def test_a_failed_evaluation_leaves_the_model_and_the_same_command_scores_it(recipe_file: Path, tmp_path: Path) -> None:
    broken = broken_later(tmp_path / "set")
    sets = (f"evaluation.zero_shot={{ mine = '{broken}' }}", "optim.steps=3")
    failed = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert failed.code == EXIT_USER_ERROR
    assert "0.tar: 3: its label (.cls) is 2; labels must be numbers from 0 to 1" in failed.err
    assert f"Training is done and kept in {tmp_path / 'run' / 'model'}" in failed.err
    assert "Traceback" not in failed.err
    weights = (tmp_path / "run" / "model" / "open_clip_model.safetensors").read_bytes()
    _labels(tmp_path / "set", b"0")
    again = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["zero_shot"]["mine"]["images"] == 4
    assert (tmp_path / "run" / "model" / "open_clip_model.safetensors").read_bytes() == weights


def test_an_evaluation_that_fails_on_the_way_costs_no_step(recipe_file: Path, tmp_path: Path) -> None:
    sets = (f"evaluation.zero_shot={{ mine = '{broken_later(tmp_path / 'set')}' }}", "evaluation.every=2", "checkpoint.every=50")
    failed = train(recipe_file, "--out", tmp_path / "run", sets=(*sets, "optim.steps=3"))
    assert failed.code == EXIT_USER_ERROR
    assert [path.name for path in checkpoint.available(tmp_path / "run")] == ["step_00000002"]
    _labels(tmp_path / "set", b"0")
    again = train(recipe_file, "--out", tmp_path / "run", sets=(*sets, "optim.steps=3"))
    assert again.code == 0, again.err
    assert [event["step"] for event in events(tmp_path / "run", "evaluation")] == [2, 3]


def test_a_bundle_is_written_before_its_questions_are_asked_and_changes_no_answer(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    """In bf16 the bundle gets the optimizer's float32 weights; what answers afterwards is what would have answered before."""
    config = ds_config(tmp_path / "bf16.json", zero_optimization={"stage": 1}, bf16={"enabled": True})
    own = (f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer", "optim.lr=1e-2", "optim.schedule=constant")

    def run(name: str, *more: str) -> Any:
        return train(recipe_file, "--out", tmp_path / name, "--ds_config", config, sets=(*answering(world), *own, *more))

    failed = run("failed", "optim.steps=3", f"evaluation.zero_shot={{ mine = '{broken_later(tmp_path / 'set')}' }}")
    assert failed.code == EXIT_USER_ERROR
    assert f"{tmp_path / 'failed' / 'model'} and {tmp_path / 'failed' / 'bundle'}" in failed.err
    assert not (tmp_path / "failed" / "vqa.json").exists()
    ended, during = run("ended", "optim.steps=3"), run("during", "optim.steps=4", "evaluation.every=3")
    assert (ended.code, during.code) == (0, 0), ended.err + during.err
    at_the_end, on_the_way = (events(tmp_path / name, "evaluation")[0] for name in ("ended", "during"))
    assert at_the_end["step"] == on_the_way["step"] == 3
    assert at_the_end["content"]["vqa"] == on_the_way["content"]["vqa"]
    weights = [(tmp_path / name / "bundle" / "projector.safetensors").read_bytes() for name in ("failed", "ended")]
    assert weights[0] == weights[1]


def test_a_set_that_is_none_is_refused_before_training(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", captioned(3))
    for kind, said in (("hard_negatives", "has no .json member"), ("retrieval", None)):
        sets = (f"evaluation.{kind}={{ mine = '{tmp_path}/0.tar' }}", "optim.steps=3")
        found = train(recipe_file, "--dry_run", "--out", tmp_path / "run", sets=sets)
        assert found.code == (EXIT_USER_ERROR if said else 0), found.err
        assert f"evaluation.{kind}.mine" in found.err if said else not found.err
        assert (said or "") in found.err
    assert not (tmp_path / "run").exists()


def test_pictures_of_questions_that_cannot_be_read_are_found_by_the_dry_run(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    own = (*answering(world), f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer")
    broken = [(f"{number:09d}.png", b"none") for number in range(60)]
    write_tar(tmp_path / "test" / "0.tar", broken)
    asked = question_source(world, "test").replace(f"{world}/test/*.tar", f"{tmp_path}/test/*.tar")
    found = train(recipe_file, "--dry_run", "--out", tmp_path / "run", sets=(*own, f"evaluation.vqa.test={asked}"))
    assert found.code == EXIT_USER_ERROR
    assert "evaluation.vqa.test: 16 of" in found.err
    assert "corrupt_image 16" in found.err
