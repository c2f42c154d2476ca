"""Images without captions: objectives on images alone, from teachers of images alone, read none."""

from __future__ import annotations

import math
import tarfile
from pathlib import Path

import pytest
import torch

import support.image_teachers  # noqa: F401  (registers the models)
from megakd.planning import models
from megakd.planning import plan as planner
from megakd.recipe import load as recipes
from support.runs import TEACHER, TRAIN, losses, rows, run_ranks, settings, train

TAUGHT = ("teacher.model=timm:test_vit", "teacher.pretrained=random", "objectives.contrastive=0", "objectives.feature=1.0")
PATCHES = ("objectives.patch=1.0", "patch.blocks=[-1]", "patch.teacher_blocks=[-2]")
SHORT = ("optim.steps=3", "optim.warmup=0", "views.flip=0.5")
UNREAD = "no objective reads the student's texts: nothing but weight decay moves its text tower"


@pytest.fixture(scope="module")
def images(world: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The training shards of the world without their captions."""
    folder = tmp_path_factory.mktemp("images")
    for shard in sorted((world / "train").glob("*.tar")):
        with tarfile.open(shard) as whole, tarfile.open(folder / shard.name, "w") as bare:
            for member in whole:
                if not member.name.endswith(".txt"):
                    bare.addfile(member, whole.extractfile(member))
    return f"data.train={folder}/*.tar"


def test_a_student_learns_from_them_what_it_learns_from_pairs(recipe_file: Path, images: str, tmp_path: Path) -> None:
    both = (*TAUGHT, *PATCHES, *SHORT)
    runs = {name: train(recipe_file, "--out", tmp_path / name, sets=(*both, *more)) for name, more in (("bare", (images,)), ("pairs", ()))}
    for name, run in runs.items():
        assert run.code == 0, run.err
        assert f"{UNREAD} and captions are not read" in run.out
        assert rows(tmp_path / name)[-1]["bad_samples"] == {}
    assert losses(tmp_path / "bare") == losses(tmp_path / "pairs")
    assert all(map(math.isfinite, losses(tmp_path / "bare")))
    shown = train(recipe_file, "--dry_run", sets=(*both, images))
    assert shown.code == 0, shown.err
    assert UNREAD in shown.out


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_and_micro_batches_learn_what_one_learns(stage: int, recipe_file: Path, images: str, tmp_path: Path) -> None:
    both = (*TAUGHT, *PATCHES, *SHORT, images)
    alone = train(recipe_file, "--out", tmp_path / "alone", sets=both)
    assert alone.code == 0, alone.err
    config = tmp_path / "ds.json"
    config.write_text(
        f'{{"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0, "zero_optimization": {{"stage": {stage}}}}}', encoding="utf-8"
    )
    run_ranks(TRAIN, "--recipe", recipe_file, "--out", tmp_path / "two", "--ds_config", config, *settings(*both))
    for one, two in zip(losses(tmp_path / "alone"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_an_int8_teacher_is_calibrated_and_compared_on_them(recipe_file: Path, images: str, tmp_path: Path) -> None:
    int8 = ("teacher.mode=replicated_int8", "teacher.calibration=8", *SHORT, images)
    run = train(recipe_file, "--out", tmp_path / "run", sets=(*TAUGHT, *int8))
    assert run.code == 0, run.err
    assert "outliers moved into the weights by 8 pairs" in run.out


def test_the_plan_leaves_the_text_tower_out_of_a_step(recipe_file: Path) -> None:
    def planned(*sets: str) -> models.StudentCost:
        return planner.job_of(recipes.load(str(recipe_file), [*TAUGHT, *sets])[0], "tiny", None, planner.Cluster(1, 80)).student

    bare, paired = planned(), planned("objectives.contrastive=1.0")
    assert bare.sizes == paired.sizes
    assert bare.flops < paired.flops
    assert bare.forward < paired.forward


def test_an_objective_on_texts_refuses_them_by_name(recipe_file: Path, images: str, tmp_path: Path) -> None:
    refused = train(recipe_file, "--out", tmp_path / "run", sets=(*TAUGHT, "objectives.contrastive=1.0", images))
    assert refused.code == 2
    assert "has both an image and a caption" in refused.err
    assert "Captions are read from .txt members (data.caption)" in refused.err


@pytest.mark.parametrize("key", ["captions={ txt = 1, 'json:re' = 1 }", "clean=['urls']"])
def test_what_is_said_of_captions_that_nobody_reads_is_refused(key: str, recipe_file: Path, images: str, tmp_path: Path) -> None:
    refused = train(recipe_file, "--dry_run", "--out", tmp_path / "run", sets=(*TAUGHT, images, f"data.{key}"))
    assert refused.code == 2
    assert f"data.{key.partition('=')[0]}: neither an objective nor a teacher of this recipe reads captions" in refused.err


def test_a_text_tower_that_no_objective_reads_is_said_though_a_clip_teaches(recipe_file: Path, tmp_path: Path) -> None:
    """Its own texts are embedded, as those of a live CLIP teacher always are, so that captions are read."""
    patches = ("objectives.contrastive=0", "objectives.patch=1.0", "patch.blocks=[-1]", "patch.teacher_blocks=[-1]", *SHORT)
    run = train(recipe_file, "--out", tmp_path / "run", sets=(*TEACHER, *patches))
    assert run.code == 0, run.err
    assert f"{UNREAD}\n" in run.out
    paired = train(recipe_file, "--out", tmp_path / "paired", sets=(*TEACHER, "objectives.feature=1.0", *SHORT))
    assert UNREAD not in paired.out


def test_without_zero_on_one_rank_weight_decay_moves_what_no_objective_reads_as_with_zero(
    recipe_file: Path, images: str, tmp_path: Path
) -> None:
    """Its gradient is zero and not missing, for which AdamW would leave the decay out."""
    from safetensors.torch import load_file

    config = tmp_path / "zero.json"
    config.write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    found = {}
    for name, more in (("none", ()), ("zero", ("--ds_config", config))):
        sets = (*TAUGHT, *SHORT, images, "optim.weight_decay=0.5", "optim.steps=3")
        run = train(recipe_file, "--out", tmp_path / name, *more, sets=sets)
        assert run.code == 0, run.err
        found[name] = load_file(tmp_path / name / "model" / "open_clip_model.safetensors")["text_projection"]
    still = train(recipe_file, "--out", tmp_path / "still", sets=(*TAUGHT, *SHORT, images, "optim.weight_decay=0.0", "optim.steps=3"))
    assert still.code == 0, still.err
    undecayed = load_file(tmp_path / "still" / "model" / "open_clip_model.safetensors")["text_projection"]
    assert found["none"].norm() < 0.9999 * undecayed.norm()
    torch.testing.assert_close(found["none"], found["zero"], rtol=1e-6, atol=1e-7)


def test_the_text_tower_stays_but_for_weight_decay(recipe_file: Path, images: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    still = (*TAUGHT, *SHORT, images, "optim.weight_decay=0.0")
    for name, steps in (("one", 1), ("three", 3)):
        run = train(recipe_file, "--out", tmp_path / name, sets=(*still, f"optim.steps={steps}"))
        assert run.code == 0, run.err
    first, last = (load_file(tmp_path / name / "model" / "open_clip_model.safetensors") for name in ("one", "three"))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert any(name.startswith("visual.") for name in moved)
    assert not any(
        name.startswith(("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_projection")) for name in moved
    )
