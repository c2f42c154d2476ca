"""Runs whose teacher is a vision tower of transformers, in every placement and precision, and what the planner counts of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megakd.planning import plan as planner
from megakd.recipe import load as recipes
from megakd.recipe.placements import MODES
from support.runs import TRAIN, losses, rows, run_ranks, settings, train
from support.transformers_folders import save

OF_IMAGES = (
    "objectives.contrastive=0", "objectives.feature=1.0", "objectives.patch=1.0", "objectives.patch_relation=1.0", "patch.blocks=[-1]",
    "patch.teacher_blocks=[-2]", "patch_relation.blocks=[-1]", "optim.steps=2", "optim.warmup=0",
)  # fmt: skip


def of(folder: Path, mode: str = "replicated") -> tuple[str, ...]:
    return f"teacher.model=transformers:{folder}", f"teacher.mode={mode}", *OF_IMAGES


@pytest.mark.parametrize(("kind", "pooled"), [("registers", "pooler_output"), ("sam", "mean over the patches")])
def test_a_tower_of_transformers_teaches_in_every_placement(kind: str, pooled: str, recipe_file: Path, tmp_path: Path) -> None:
    save(kind, tmp_path / "teacher")
    found_by = {}
    for mode in MODES:
        run = train(recipe_file, "--out", tmp_path / mode, sets=of(tmp_path / "teacher", mode))
        assert run.code == 0, run.err
        first, second = rows(tmp_path / mode)
        assert math.isfinite(second["loss"])
        found_by[mode] = first["losses"]
    assert f"teacher: the embedding of an image is the {pooled}" in run.out
    for mode, found in found_by.items():
        assert list(found) == ["feature", "patch", "patch_relation"]
        for name, value in found.items():
            most = 0.05 if mode.endswith("int8") else 1e-5
            assert value == pytest.approx(found_by["replicated"][name], rel=most, abs=most / 5), (mode, name)


def test_two_ranks_hold_a_partitioned_one_in_8_bit_and_learn_what_one_rank_learns(recipe_file: Path, tmp_path: Path) -> None:
    save("dinov2_resized", tmp_path / "teacher")
    sets = (*of(tmp_path / "teacher", "zero3_int8"), "teacher.int8_product=dequantise", "optim.steps=3")
    alone = train(recipe_file, "--out", tmp_path / "alone", sets=sets)
    assert alone.code == 0, alone.err
    run_ranks(TRAIN, "--recipe", recipe_file, "--out", tmp_path / "both", *settings(*sets))
    for one, two in zip(losses(tmp_path / "alone"), losses(tmp_path / "both"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_it_is_checked_and_planned_without_a_weight(recipe_file: Path, tmp_path: Path) -> None:
    model = save("clip_resized", tmp_path / "teacher")
    shown = train(recipe_file, "--out", tmp_path / "dry", "--dry_run", sets=of(tmp_path / "teacher"))
    assert shown.code == 0, shown.err
    assert "pixels (3, 40, 40) -> (48,)\n" in shown.out
    assert "the embedding of an image is the pooler_output of CLIPVisionModel" in shown.out
    recipe, _ = recipes.load(str(recipe_file), list(of(tmp_path / "teacher")))
    (cost,) = planner.plan(recipe, "tiny", None, planner.Cluster(2, 80)).job.teachers
    assert cost.text is None
    assert cost.image.wide.numel == sum(parameter.numel() for parameter in model.parameters())
    (tmp_path / "teacher" / "preprocessor_config.json").unlink()
    refused = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=of(tmp_path / "teacher"))
    assert refused.code == 2
    assert "no preprocessor_config.json there, so nothing says how its images are prepared" in refused.err
    beside = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*of(tmp_path / "teacher"), "objectives.similarity=1.0"))
    assert beside.code == 2
