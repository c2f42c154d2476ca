"""The vision tower of a run that answers: in parts under ZeRO-3, and a frozen one with statistics that answers leave alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megakd.runtime import checkpoint
from support.decoders import evaluated_and_asked_again
from support.runs import KD, TINY_LLAMA, answering, ds_config, losses, ran, zero

STEPS = ("optim.steps=3", "optim.warmup=0", "checkpoint.every=1", "checkpoint.keep=9", "optim.batch=8", "optim.clip=0.0")
RESNET = ("student.architecture.vision_cfg={ image_size = 64, layers = [1, 1, 1, 1], width = 8, head_width = 16 }",)
WITHOUT_OBJECTIVES = ("objectives.contrastive=0.0",)


@pytest.fixture(scope="module")
def asking(world: Path) -> tuple[str, ...]:
    """Overrides that add a decoder of random weights, with adapters, and the world's questions."""
    return (f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer", *answering(world), *STEPS)


def statistics(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Batch norm's, in the vision tower of a checkpoint."""
    weights = checkpoint.load(run / "checkpoints" / f"step_{step:08d}")[1].weights
    return {name: value for name, value in weights.items() if "running_" in name or "num_batches" in name}


@pytest.mark.parametrize("tower", ["trained", "frozen"])
@pytest.mark.parametrize("objectives", [(), WITHOUT_OBJECTIVES], ids=["alongside", "alone"])
def test_a_tower_that_zero_3_has_in_parts_is_whole_in_the_bundle(
    recipe_file: Path, asking: tuple[str, ...], tmp_path: Path, tower: str, objectives: tuple[str, ...]
) -> None:
    config = ds_config(tmp_path / "z.json", zero_optimization=zero(3))
    run = ran(recipe_file, tmp_path / "run", *asking, *objectives, f"answers.tower={tower}", config=config)
    said, again = evaluated_and_asked_again(run)
    assert said == again
    inside = load_file(run / "bundle" / "tower" / "open_clip_model.safetensors")
    assert all(value.numel() for value in inside.values())
    if not objectives:
        model = load_file(run / "model" / "open_clip_model.safetensors")
        assert inside.keys() == model.keys()
        assert all(torch.equal(value, model[name]) for name, value in inside.items())


def test_zero_3_in_bf16_is_judged_and_its_bundle_has_the_optimizers_weights(
    recipe_file: Path, asking: tuple[str, ...], tmp_path: Path
) -> None:
    config = ds_config(tmp_path / "z.json", zero_optimization=zero(3), bf16={"enabled": True})
    run = ran(recipe_file, tmp_path / "run", *asking, "answers.tower=trained", config=config)
    assert json.loads((run / "vqa.json").read_text())["sets"]["test"]["questions"] > 0
    inside, model = (load_file(folder / "open_clip_model.safetensors") for folder in (run / "bundle" / "tower", run / "model"))
    assert all(torch.equal(value, model[name]) for name, value in inside.items())


def test_a_bundle_of_bf16_has_the_optimizers_weights(recipe_file: Path, asking: tuple[str, ...], tmp_path: Path) -> None:
    config = ds_config(tmp_path / "z.json", zero_optimization=zero(2), bf16={"enabled": True})
    run = ran(recipe_file, tmp_path / "run", *asking, "answers.tower=trained", config=config)
    weights = checkpoint.load(run / "checkpoints" / "step_00000003")[1].weights
    projector, adapter = (load_file(run / "bundle" / name) for name in ("projector.safetensors", "adapter/adapter_model.safetensors"))
    assert all(torch.equal(value, weights[f"decoder.projector.{name}"]) for name, value in projector.items())
    trained = {name.removeprefix("decoder.language.").replace(".default", ""): value for name, value in weights.items()}
    assert all(torch.equal(value, trained[name]) for name, value in adapter.items())
    inside, model = (load_file(folder / "open_clip_model.safetensors") for folder in (run / "bundle" / "tower", run / "model"))
    assert all(torch.equal(value, model[name]) for name, value in inside.items())


def test_a_frozen_tower_keeps_its_statistics_and_the_bundle_answers_as_the_evaluation(
    recipe_file: Path, asking: tuple[str, ...], tmp_path: Path
) -> None:
    run = ran(recipe_file, tmp_path / "run", *WITHOUT_OBJECTIVES, *RESNET, *asking)
    first, last = statistics(run, 1), statistics(run, 3)
    assert first
    assert all(torch.equal(value, last[name]) for name, value in first.items())
    assert all(int(value) == 0 for name, value in last.items() if "num_batches" in name)
    said, again = evaluated_and_asked_again(run)
    assert said == again


def test_answers_alongside_leave_a_frozen_towers_statistics_to_the_pairs(
    recipe_file: Path, asking: tuple[str, ...], tmp_path: Path
) -> None:
    both = ran(recipe_file, tmp_path / "both", *KD, *RESNET, *asking)
    alone = ran(recipe_file, tmp_path / "alone", *KD, *RESNET, *STEPS)
    found, expected = statistics(both, 3), statistics(alone, 3)
    assert expected
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_dropout_of_the_language_model_does_not_depend_on_evaluations(recipe_file: Path, asking: tuple[str, ...], tmp_path: Path) -> None:
    """transformers loads models in evaluation mode, and an evaluation comes back to training."""
    gpt = "{ model_type = 'gpt2', n_embd = 32, n_layer = 1, n_head = 2, n_positions = 128 }"
    blind = (*WITHOUT_OBJECTIVES, *asking, f"decoder.architecture={gpt}", "decoder.adapt=full")
    first = ran(recipe_file, tmp_path / "first", *blind)
    named = tuple(item for item in asking if not item.startswith(("decoder.architecture", "decoder.tokenizer")))
    sets = (*WITHOUT_OBJECTIVES, *named, f"decoder.model={first}/bundle/language")
    often = ran(recipe_file, tmp_path / "often", *sets, "evaluation.every=1")
    seldom = ran(recipe_file, tmp_path / "seldom", *sets)
    assert losses(often) == losses(seldom)
