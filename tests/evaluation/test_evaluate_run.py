"""Evaluation of real runs: in training and after it, and the exported model in open_clip's own hands."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image

from megakd import cli
from megakd.evaluation import run as evaluation_run
from megakd.runtime import checkpoint
from megakd.runtime.exits import EXIT_USER_ERROR
from support import REPOSITORY
from support.processes import python
from support.runs import Finished, ds_config, events, megakd, run_ranks, train

STEPS = 4


@pytest.fixture(scope="module")
def run(recipe_file: Path, evaluations: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    config = ds_config(folder / "bf16.json", zero_optimization={"stage": 2}, bf16={"enabled": True})
    sets = (*evaluations, f"optim.steps={STEPS}", "evaluation.every=2", "optim.lr=1e-2")
    finished = train(recipe_file, "--out", folder / "run", "--ds_config", config, sets=sets)
    assert finished.code == 0, finished.err
    return folder / "run"


def _results(run: Path) -> dict[str, Any]:
    results = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    results.pop("images_per_second")
    results.pop("models", None)  # of the verb alone
    return results  # type: ignore[no-any-return]


def _evaluate(*arguments: str | Path) -> Finished:
    with python("-m", "megakd.cli", "evaluate", *arguments) as process:
        out, err = process.communicate()
    return Finished(process.returncode, out, err)


def test_evaluation_json_has_every_set_kind_and_number(run: Path) -> None:
    found = _results(run)
    assert found["step"] == STEPS
    assert found["zero_shot"]["seen"]["images"] == 70
    assert 0 <= found["zero_shot"]["seen"]["top1"] <= found["zero_shot"]["seen"]["top5"] <= 1
    both = found["retrieval"]["test"]
    assert both["pairs"] == 60
    for way in ("image_to_text", "text_to_image"):
        assert 0 <= both[way]["R@1"] <= both[way]["R@5"] <= both[way]["R@10"] <= 1
    assert both["mean_R@1"] == pytest.approx((both["image_to_text"]["R@1"] + both["text_to_image"]["R@1"]) / 2)
    assert {"relation", "attribute_swap", "count"} <= set(found["hard_negatives"]["test"])
    assert found["parameters"] > 10_000


def test_training_evaluates_as_often_as_the_recipe_says(run: Path) -> None:
    assert [event["step"] for event in events(run, "evaluation")] == [2, 4]
    assert {key: value for key, value in events(run, "evaluation")[-1]["content"].items() if key != "images_per_second"} == _results(run)


def test_evaluate_reproduces_what_training_wrote(run: Path) -> None:
    written = _results(run)
    (run / "evaluation.json").unlink()
    finished = _evaluate(run)
    assert finished.code == 0, finished.err
    assert "evaluation at step 4" in finished.out
    assert _results(run) == written


def test_evaluate_takes_a_checkpoint_and_other_sets(run: Path, world: Path) -> None:
    before = dict(os.environ)
    original = (run / "evaluation.json").read_text()
    try:
        evaluation_run.evaluate_run(run, checkpoint.available(run)[0], [f"evaluation.retrieval.train={world}/train/00000.tar"])
    finally:
        os.environ.clear()
        os.environ.update(before)
    found = _results(run)
    (run / "evaluation.json").write_text(original)
    assert found["step"] == 2
    assert found["retrieval"]["train"]["pairs"] == 200
    two_steps = events(run, "evaluation")[0]["content"]
    assert found["retrieval"]["test"] == two_steps["retrieval"]["test"]
    assert found["zero_shot"] == two_steps["zero_shot"]


def test_evaluate_refuses_a_folder_without_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["megakd", "evaluate", str(tmp_path)])
    assert cli.main() == EXIT_USER_ERROR
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}: no run folder")
    assert "Traceback" not in printed


def test_the_exported_folder_is_a_model_for_open_clip(run: Path, world: Path) -> None:
    name = f"local-dir:{run / 'model'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenize = open_clip.get_tokenizer(name)
    model.eval()
    own = checkpoint.load_weights(checkpoint.available(run)[-1])[1]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value.reshape(-1), own[f"clip.{key}"].reshape(-1), rtol=0, atol=0, msg=key)
    with torch.no_grad():
        image = model.encode_image(preprocess(Image.new("RGB", (40, 30), (200, 30, 30))).unsqueeze(0), normalize=True)
        text = model.encode_text(tokenize(["a large red circle"]), normalize=True)
    assert image.shape == text.shape == (1, 16)
    ours = open_clip.tokenizer.HFTokenizer(f"{world}/tokenizer", context_length=32)
    assert torch.equal(tokenize(["a large red circle", "a small blue square"]), ours(["a large red circle", "a small blue square"]))


def test_an_exported_model_teaches_the_next_student(run: Path, recipe_file: Path, tmp_path: Path) -> None:
    sets = (f"teacher.model=local-dir:{run / 'model'}", "objectives.similarity=1.0", "objectives.feature=1.0", "optim.steps=3")
    finished = train(recipe_file, "--out", tmp_path / "student", sets=sets)
    assert finished.code == 0, finished.err
    assert (tmp_path / "student" / "model" / "open_clip_model.safetensors").is_file()
    exported = open_clip.create_model(f"local-dir:{tmp_path / 'student' / 'model'}").state_dict()
    assert not any(key.startswith("heads") for key in exported)


def test_the_table_has_size_and_speed_of_student_and_teacher(
    run: Path, recipe_file: Path, evaluations: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "model", tmp_path / "teacher")
    sets = (f"teacher.model=local-dir:{tmp_path}/teacher", "objectives.similarity=1.0", "optim.steps=3", *evaluations)
    finished = train(recipe_file, "--out", tmp_path / "student", sets=sets)
    assert finished.code == 0, finished.err
    trained = _results(tmp_path / "student")
    table, _ = run_ranks(REPOSITORY / "megakd" / "cli" / "__main__.py", "evaluate", tmp_path / "student")
    models = json.loads((tmp_path / "student" / "evaluation.json").read_text())["models"]
    assert _results(tmp_path / "student") == trained
    assert models["student"]["parameters"] == models["teacher"]["parameters"] == trained["parameters"]
    assert models["student"]["bytes"] == models["teacher"]["bytes"] >= 4 * trained["parameters"]
    assert models["student"]["images_per_second"] > 0
    assert models["teacher"]["images_per_second"] > 0
    assert f"{models['teacher']['images_per_second']:,.1f}" in table
    assert re.search(r"zero-shot seen \(70 images\) +top-1 +\d", table)
    shutil.rmtree(tmp_path / "teacher")
    capsys.readouterr()
    assert megakd("evaluate", tmp_path / "student", "--set", "data.workers=0") == 0
    assert "not measured: " in capsys.readouterr().out
    gone = json.loads((tmp_path / "student" / "evaluation.json").read_text())["models"]["teacher"]
    assert gone["parameters"] is gone["images_per_second"] is None
    assert f"{tmp_path}/teacher" in gone["not_measured"]


def _refused(found: Finished) -> str:
    assert found.code == EXIT_USER_ERROR, found.err
    assert "Traceback" not in found.err
    assert "initialized randomly" not in found.err
    return found.err


def test_evaluate_says_in_one_message_what_is_wrong_with_a_run(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def evaluate_here(*arguments: str | Path) -> Finished:
        capfd.readouterr()
        return Finished(megakd("evaluate", *arguments), *capfd.readouterr())

    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    scored = (copied / "evaluation.json").read_text()
    wider = "student.architecture.text_cfg.width=64"
    assert "a checkpoint of another student than this run's recipe has" in _refused(_evaluate(copied, "--set", wider))
    for saved in checkpoint.available(copied):
        weights = saved / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
    assert "checkpoints are damaged" in _refused(evaluate_here(copied))
    assert "no checkpoint there" in _refused(evaluate_here(copied, "--checkpoint", tmp_path))
    shutil.rmtree(copied / "checkpoints")
    assert "no checkpoint in it yet" in _refused(evaluate_here(copied))
    assert (copied / "evaluation.json").read_text() == scored
