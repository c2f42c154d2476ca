"""Runs that learn from their teacher's attention alone: in every placement, and on two ranks what one learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megakd.recipe.placements import MODES
from support.runs import TEACHER, TRAIN, ds_config, losses, run_ranks, settings, train, zero
from support.teachers import KINDS

ALONE = ("objectives.contrastive=0", "objectives.attention=1.0", "optim.steps=2", "optim.warmup=0")
WEIGHTS = ("attention={ map = 'weights', loss = 'kl' }",)


def _inline(value: Any) -> str:
    """A value as TOML writes it in one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    return json.dumps("" if value is None else value)


def _teacher(kind: str, world: Path) -> tuple[str, ...]:
    return f"teacher.architecture={_inline(KINDS[kind])}", "teacher.pretrained=random", f"teacher.tokenizer={world}/tokenizer"


@pytest.mark.parametrize("kind", ["ViT-bigG", "EVA02-E"])
def test_attention_is_the_same_in_every_placement(kind: str, recipe_file: Path, world: Path, tmp_path: Path) -> None:
    found = {}
    for mode in MODES:
        run = train(recipe_file, "--out", tmp_path / mode, sets=(*_teacher(kind, world), *ALONE, *WEIGHTS, f"teacher.mode={mode}"))
        assert run.code == 0, run.err
        found[mode] = losses(tmp_path / mode)
    assert found["replicated"][1] != found["replicated"][0] > 0
    for mode, values in found.items():
        assert values == pytest.approx(found["replicated"], rel=0.05 if mode.endswith("int8") else 1e-5), mode


@pytest.mark.parametrize("sets", [WEIGHTS, ("attention.blocks=[-1]",)], ids=["weights", "activation"])
def test_two_partitioned_ranks_that_recompute_learn_what_one_learns_at_once(
    sets: tuple[str, ...], recipe_file: Path, tmp_path: Path
) -> None:
    """In four micro-batches a rank on one side, in one on the other."""
    learned = (*TEACHER, *ALONE, *sets, "optim.steps=3")
    alone = train(recipe_file, "--out", tmp_path / "alone", sets=(*learned, "teacher.mode=replicated_int8"))
    assert alone.code == 0, alone.err
    pieces = ds_config(tmp_path / "pieces.json", zero_optimization=zero(3), gradient_accumulation_steps=4)
    hard = ("teacher.mode=zero3_int8", "student.activation_checkpointing=true")
    run_ranks(TRAIN, "--recipe", recipe_file, "--out", tmp_path / "both", "--ds_config", pieces, *settings(*learned, *hard))
    one = losses(tmp_path / "alone")
    assert one[2] != one[0]
    assert losses(tmp_path / "both") == pytest.approx(one, rel=1e-5)


def test_a_teacher_without_attention_is_one_message_before_anything_is_loaded(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    for kind in ("ResNet", "ConvNeXt"):
        refused = train(recipe_file, "--out", tmp_path / kind, sets=(*_teacher(kind, world), *ALONE, *WEIGHTS))
        assert refused.code == 2
        assert "teacher: attention.teacher_blocks = -1: a vision tower of class" in refused.err
        assert "set attention.map to 'activation', which every tower has" in refused.err
    assert not (tmp_path / "ConvNeXt").exists()
