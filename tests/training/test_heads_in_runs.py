"""Heads of objectives in whole runs: what is chosen and said, what a run from before goes on with, micro-batches and ZeRO-3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open

import megakd
from megakd.runtime import checkpoint
from megakd.runtime.exits import EXIT_USER_ERROR
from support.runs import ENSEMBLE, TEACHER, TINY_LLAMA, answering, curve, ds_config, losses, ran, rows, train, zero

STEPS = ("optim.steps=3", "checkpoint.every=1", "checkpoint.keep=9", "optim.warmup=0")
OF_ONE_WIDTH = (TEACHER[0].replace("embed_dim = 24", "embed_dim = 16"), TEACHER[1], *STEPS)
TAUGHT = ("objectives.feature=0.5", "objectives.interactive=0.5")


def _heads(run: Path) -> dict[str, tuple[int, ...]]:
    weights = checkpoint.load_weights(checkpoint.available(run)[-1])[1]
    return {name: tuple(value.shape) for name, value in weights.items() if name.startswith("heads.")}


def _back_to_the_first_step(run: Path) -> None:
    for path in checkpoint.available(run)[1:]:
        shutil.rmtree(path)


def test_at_one_width_a_run_has_no_heads_says_so_and_learns_its_own_scale(recipe_file: Path, tmp_path: Path) -> None:
    sets = (*OF_ONE_WIDTH, *TAUGHT, "interactive.scale=own")
    finished = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert finished.code == 0, finished.err
    assert "heads: interactive none, feature none" in finished.out
    assert _heads(tmp_path / "run") == {"heads.interactive.log_scale": (1,)}
    first, last = (checkpoint.load_weights(checkpoint.available(tmp_path / "run")[at])[1]["heads.interactive.log_scale"] for at in (0, -1))
    assert first != last
    logged = [row["interactive"]["scale"] for row in rows(tmp_path / "run")]
    assert logged[0] == pytest.approx(1 / 0.07)
    assert len(set(logged)) == len(logged)
    parted = ds_config(tmp_path / "parted.json", train_micro_batch_size_per_gpu=4, zero_optimization=zero(3))
    pieces = ran(recipe_file, tmp_path / "pieces", *sets, config=parted)
    for row, expected in zip(curve(pieces), curve(tmp_path / "run"), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_a_run_that_began_with_heads_goes_on_with_them_where_the_recipe_leaves_it_open(recipe_file: Path, tmp_path: Path) -> None:
    """Every run.json from before the kind could be left open names it."""
    run = ran(recipe_file, tmp_path / "run", *OF_ONE_WIDTH, *TAUGHT, "feature.head=linear", "interactive.head=mlp")
    whole, heads = curve(run), _heads(run)
    shutil.copytree(run, tmp_path / "began")
    _back_to_the_first_step(run)
    finished = train(recipe_file, "--out", run, sets=(*OF_ONE_WIDTH, *TAUGHT))
    assert finished.code == 0, finished.err
    assert "heads: interactive mlp 16 -> 16, feature linear 16 -> 16" in finished.out
    assert curve(run) == whole
    assert _heads(run) == heads != {}
    assert json.loads((run / "run.json").read_text())["recipe"]["feature"]["head"] == "linear"
    elsewhere = train(
        recipe_file, "--out", tmp_path / "other", "--resume", checkpoint.available(tmp_path / "began")[0], sets=(*OF_ONE_WIDTH, *TAUGHT)
    )
    assert elsewhere.code == 0, elsewhere.err
    assert curve(tmp_path / "other") == whole[1:]
    refused = train(recipe_file, "--out", run, sets=(*OF_ONE_WIDTH, *TAUGHT, "feature.head=none"))
    assert refused.code == EXIT_USER_ERROR
    assert "feature.head: 'linear' -> 'none'" in refused.err


def test_no_head_between_unlike_widths_ends_a_run_before_it_starts(recipe_file: Path, tmp_path: Path) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", sets=(*TEACHER, *STEPS, *TAUGHT, "feature.head=none"))
    assert finished.code == EXIT_USER_ERROR
    assert "feature.head = 'none': the student's embeddings have 16 numbers and the teacher's 24" in finished.err
    assert not checkpoint.available(tmp_path / "run")


def test_masked_images_are_drawn_anew_each_step_and_again_where_a_run_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    sets = (*TEACHER, *STEPS, "optim.lr=1e-9", "objectives.masked_feature=1.0", "objectives.contrastive=0.0", "data.block=1")
    parted = ds_config(tmp_path / "parted.json", train_micro_batch_size_per_gpu=4, zero_optimization=zero(3))
    run = ran(recipe_file, tmp_path / "run", *sets, config=parted)
    whole = curve(run)
    _back_to_the_first_step(run)
    assert curve(ran(recipe_file, run, *sets, config=parted)) == whole
    masked = [step[1] for step in whole]
    whole_images = [step[1] for step in curve(ran(recipe_file, tmp_path / "whole", *(one.replace("masked_", "") for one in sets)))]
    assert all(a != b for a, b in zip(masked, whole_images, strict=True))


def test_a_fusion_with_each_teacher_learns_the_same_in_micro_batches_under_zero3(recipe_file: Path, tmp_path: Path) -> None:
    sets = (*TEACHER, *ENSEMBLE, *STEPS, "objectives.augmented_feature=1.0", "objectives.cross=0.5", "cross.scale=30.0")
    whole = ran(recipe_file, tmp_path / "whole", *sets)
    parted = ds_config(tmp_path / "parted.json", train_micro_batch_size_per_gpu=4, zero_optimization=zero(3))
    pieces = ran(recipe_file, tmp_path / "pieces", *sets, config=parted)
    for row, expected in zip(curve(pieces), curve(whole), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    of_fusion = {"image.bias": (16,), "image.weight": (16, 40), "log_scale": (1,), "text.bias": (16,), "text.weight": (16, 40)}
    found = _heads(whole)
    assert {name: found[f"heads.augmented_feature.{name}"] for name in of_fusion} == of_fusion
    assert found["heads.augmented_feature1.image.weight"] == (16, 36)
    weights = [checkpoint.load_weights(checkpoint.available(run)[-1])[1] for run in (whole, pieces)]
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, rtol=1e-5, atol=1e-5), name


def test_heads_are_exported_beside_the_model_where_the_recipe_asks_for_them(recipe_file: Path, tmp_path: Path) -> None:
    sets = (*TEACHER, *STEPS, *TAUGHT, "feature.head=mlp", "interactive.scale=own", "export.heads=true")
    run = ran(recipe_file, tmp_path / "run", *sets)
    weights = checkpoint.load_weights(checkpoint.available(run)[-1])[1]
    with safe_open(run / "model" / "heads.safetensors", "pt") as file:
        known = json.loads(file.metadata()["heads"])
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    assert {f"heads.{name}" for name in kept} == {name for name in weights if name.startswith("heads.")} != set()
    assert all(torch.equal(value, weights[f"heads.{name}"]) for name, value in kept.items())
    shared = {"student_width": 16, "teacher_width": 24, "teacher": "teacher", "teacher_model": None, "teacher_pretrained": "random"}
    assert known == {
        "interactive": {"objective": "interactive", "kind": "linear 16 -> 24", **shared},
        "feature": {"objective": "feature", "kind": "mlp 16 -> 24", **shared},
    }
    alone = open_clip.create_model(f"local-dir:{run / 'model'}").state_dict()
    assert all(torch.equal(alone[name.removeprefix("clip.")], weights[name]) for name in weights if name.startswith("clip.visual."))
    assert megakd.load_model(run).encode_texts(["a red circle"]).shape == (1, 16)


def test_no_heads_are_exported_unasked_or_where_none_is_trained(recipe_file: Path, tmp_path: Path) -> None:
    run = ran(recipe_file, tmp_path / "run", *TEACHER, *STEPS, *TAUGHT)
    assert not (run / "model" / "heads.safetensors").exists()
    for objective in ("objectives.feature=0.0", "objectives.similarity=1.0"):
        finished = train(recipe_file, "--out", tmp_path / "none", sets=(*TEACHER, "export.heads=true", objective))
        assert finished.code == EXIT_USER_ERROR
        assert "export.heads = true: no" in finished.err


def test_heads_that_read_their_teacher_and_masked_images_train_beside_answers(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    decoder = (f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer", *answering(world), "decoder.lora.dropout=0.0")
    sets = (*TEACHER, *STEPS, *decoder, "answers.tower=trained", "objectives.augmented_feature=1.0", "objectives.masked_feature=1.0")
    run = ran(recipe_file, tmp_path / "run", *sets, config=ds_config(tmp_path / "micro.json", train_micro_batch_size_per_gpu=8))
    assert rows(run)[0]["losses"].keys() == {"contrastive", "masked_feature", "augmented_feature", "answer"}
    assert all(loss > 0 for loss in losses(run))
