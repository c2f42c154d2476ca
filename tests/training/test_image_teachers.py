"""Runs whose teacher sees images alone, in every placement and precision, alone and beside a CLIP."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm

import support.image_teachers  # noqa: F401  (registers the models)
from megakd.planning import plan as planner
from megakd.recipe import load as recipes
from megakd.recipe.placements import MODES
from megakd.teachers import embed
from support.runs import TEACHER, TRAIN, losses, rows, run_ranks, settings, train

PATCHES = ("patch.blocks=[-1]", "patch_relation.blocks=[-1]", "patch.teacher_blocks=[-2]")
OF_IMAGES = ("objectives.contrastive=0", "objectives.feature=1.0", "objectives.masked_feature=0.5", "objectives.patch=1.0", *PATCHES)
OF_IMAGES += ("objectives.patch_relation=1.0", "objectives.attention=1.0", "attention.blocks=[-1]", "optim.steps=2", "optim.warmup=0")
BESIDE = ("ensemble.seen.model=timm:megakd_tiny_dinov3", "ensemble.seen.pretrained=random")


def teacher(kind: str, mode: str = "replicated") -> tuple[str, ...]:
    return f"teacher.model=timm:megakd_tiny_{kind}", "teacher.pretrained=random", f"teacher.mode={mode}"


@pytest.mark.parametrize("kind", ["dino", "dinov3", "sam", "classifier"])
def test_a_teacher_of_images_alone_teaches_in_every_placement(kind: str, recipe_file: Path, tmp_path: Path) -> None:
    found_by = {}
    for mode in MODES:
        run = train(recipe_file, "--out", tmp_path / mode, sets=(*teacher(kind, mode), *OF_IMAGES))
        assert run.code == 0, run.err
        first, second = rows(tmp_path / mode)
        assert math.isfinite(second["loss"])
        found_by[mode] = first["losses"]
    assert "teacher: images alone, without a part in texts" in run.out
    for mode, found in found_by.items():
        assert list(found) == ["feature", "masked_feature", "patch", "patch_relation", "attention"]
        for name, value in found.items():
            # To random weights images are nearly alike, and 8 bit moves what tells them apart.
            most = 0.05 if mode.endswith("int8") else 1e-5
            assert value == pytest.approx(found_by["replicated"][name], rel=most, abs=most / 5), (mode, name)


def test_a_clip_beside_it_teaches_the_texts(recipe_file: Path, tmp_path: Path) -> None:
    mixed = (*TEACHER, *BESIDE, *OF_IMAGES, "objectives.similarity=1.0", "objectives.contrastive=1.0", "patch.teacher_blocks=[-1]")
    shown = train(recipe_file, "--out", tmp_path / "dry", "--dry_run", sets=mixed)
    assert shown.code == 0, shown.err
    assert "pixels (3, 48, 48) -> (48,)\n" in shown.out
    run = train(recipe_file, "--out", tmp_path / "run", sets=mixed)
    assert run.code == 0, run.err
    assert "ensemble.seen: images alone, without a part in similarity; objectives" in run.out
    alone = train(recipe_file, "--out", tmp_path / "alone", sets=(*TEACHER, "objectives.similarity=1.0", "optim.steps=1", "optim.warmup=0"))
    assert alone.code == 0, alone.err
    assert rows(tmp_path / "run")[0]["losses"]["similarity"] == rows(tmp_path / "alone")[0]["losses"]["similarity"]


def test_what_it_cannot_do_is_refused_before_anything_is_loaded(recipe_file: Path, tmp_path: Path) -> None:
    refused = train(recipe_file, "--out", tmp_path / "run", sets=(*teacher("dino"), "objectives.similarity=1.0"))
    assert refused.code == 2
    assert "objectives.similarity: compares the student's texts with a teacher's, and teacher (timm:megakd_tiny_dino) sees" in refused.err
    of_features = ("teacher.model=timm:inception_v4", "teacher.pretrained=random", "objectives.contrastive=0")
    blockless = train(recipe_file, "--out", tmp_path / "run", sets=(*of_features, "objectives.patch=1", "patch.blocks=[-1]"))
    assert blockless.code == 2
    assert "teacher: patch.teacher_blocks = -1: a vision tower of class InceptionV4 has no blocks that are known here" in blockless.err
    with pytest.raises(ValueError, match=r"teacher.model: timm:megakd_tiny_dino has no text tower, and a store holds embeddings of pairs"):
        embed.run(str(recipe_file), embed.EmbedRequest(tmp_path / "store"), check=False, overrides=list(teacher("dino")))


def test_two_ranks_hold_a_partitioned_one_in_8_bit_and_learn_what_one_rank_learns(recipe_file: Path, tmp_path: Path) -> None:
    small = ("teacher.model=timm:test_vit", "teacher.pretrained=random", "teacher.mode=zero3_int8", "teacher.int8_product=dequantise")
    sets = (*small, *OF_IMAGES, "optim.steps=3", "objectives.masked_feature=0")  # each rank draws masks of its own
    alone = train(recipe_file, "--out", tmp_path / "alone", sets=sets)
    assert alone.code == 0, alone.err
    run_ranks(TRAIN, "--recipe", recipe_file, "--out", tmp_path / "both", *settings(*sets))
    for one, two in zip(losses(tmp_path / "alone"), losses(tmp_path / "both"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_the_planner_counts_its_one_tower_and_offers_no_store(recipe_file: Path) -> None:
    def planned(*sets: str) -> planner.MemoryPlan:
        recipe, _ = recipes.load(str(recipe_file), list(sets))
        return planner.plan(recipe, "tiny", None, planner.Cluster(2, 80))

    plan = planned("teacher.model=timm:vit_base_patch14_reg4_dinov2", "teacher.pretrained=lvd142m", *OF_IMAGES)
    (cost,) = plan.job.teachers
    assert cost.text is None
    assert cost.image.wide.numel == sum(p.numel() for p in timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0).parameters())
    assert {row.mode.name for row in plan.rows} == {f"{place} {kind}" for place in ("replicated", "zero3") for kind in ("bf16", "int8")} | {
        "zero3 bf16 + offload",
        "zero3 int8 + offload",
    }
    assert plan.recommended is not None
    mixed = planned(*TEACHER, *BESIDE, *OF_IMAGES, "objectives.similarity=1.0", "patch.teacher_blocks=[-1]")
    assert [cost.text is None for cost in mixed.job.teachers] == [False, True]
