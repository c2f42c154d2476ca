"""Towers compiled by torch's inductor for the CPU: the same training to rounding, under the same names, or none where no compiler is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import support.image_teachers  # noqa: F401  (registers the model)
from megakd.models import clip, compiled
from megakd.models.patches import Weights
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint
from megakd.runtime.launch import World
from megakd.runtime.run_folder import RUN
from support.runs import KD, ds_config, ran, rows, run_ranks, settings, train, zero
from support.runs import TRAIN as PROGRAM

pytestmark = pytest.mark.timeout(1800)  # a block is compiled in ten seconds of a processor, which is minutes on a machine that is busy

# Two blocks a tower, of one graph.
BLOCKS = ("student.architecture.vision_cfg.layers=2", "student.architecture.text_cfg.layers=2")
BOTH = ("student.compile=true", "teacher.compile=true")
# No text is read, so there is half as much to compile.
IMAGES = (
    *("teacher.model=timm:test_vit", "teacher.pretrained=random", "objectives={ feature = 1.0, patch = 1.0 }"),
    *("patch.blocks=[-1]", "patch.teacher_blocks=[-2]", "student.architecture.vision_cfg.layers=2"),
)
KEPT = ("optim.steps=3", "checkpoint.every=3")
SAID = "student.compile: blocks by torch.compile, 2 of its image tower and 2 of its text tower"


def _assert_same(run: Path, plain: Path, *, rel: float = 1e-4) -> None:
    """Losses and gradient norms to rounding, and checkpoints of the same names and, nearly, values."""
    assert len(rows(run)) == len(rows(plain)) > 1
    for row, expected in zip(rows(run), rows(plain), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=rel)
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=10 * rel)
    (_, mine), (_, theirs) = (checkpoint.load_weights(checkpoint.available(folder)[-1]) for folder in (run, plain))
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) < 0.2 * rel


def _note(run: Path) -> dict[str, Any]:
    """What the newest start compiled, by run.json."""
    found: dict[str, Any] = json.loads((run / RUN).read_text(encoding="utf-8"))["jobs"][-1]["compiled"]
    return found


def test_a_compiled_teacher_teaches_the_same_and_the_compilers_seconds_are_apart_from_the_steps(recipe_file: Path, tmp_path: Path) -> None:
    plain = ran(recipe_file, tmp_path / "plain", *IMAGES, *KEPT)
    run = train(recipe_file, "--out", tmp_path / "run", sets=(*IMAGES, *KEPT, "teacher.compile=true"))
    assert run.code == 0, run.err
    assert run.out.count("teacher.compile: blocks by torch.compile, 6 of its image tower; the first step") == 1
    assert "which images/s does not count: teacher, image: 6 x Block" in run.out
    _assert_same(tmp_path / "run", plain)
    _assert_the_compilers_seconds_are_apart(tmp_path / "run")
    assert not any("compile" in row["seconds"] for row in rows(plain))


def _assert_the_compilers_seconds_are_apart(run: Path) -> None:
    first, *others = rows(run)
    assert first["seconds"]["compile"] == pytest.approx(_note(run)["seconds"], abs=0.1)
    assert min(first["seconds"].values()) >= -1e-3
    assert first["images_per_second"] == pytest.approx(16 / (sum(first["seconds"].values()) - first["seconds"]["compile"]))
    assert not any("compile" in row["seconds"] for row in others)


def test_no_name_of_a_tower_changes(recipe_file: Path) -> None:
    recipe, _ = recipes.load(str(recipe_file), BLOCKS)
    assert recipe.student is not None
    model = clip.build(clip.resolve(recipe.student, "student"), torch.device("cpu")).clip
    before = list(model.state_dict())
    _, blocks = compiled.compile_towers(model, "student", World(0, 1, torch.device("cpu")))
    assert len(blocks) == 4
    assert list(model.state_dict()) == before
    twin = copy.deepcopy(model)  # whose blocks are its own
    assert [block.forward.args for block in twin.visual.transformer.resblocks] == [(block,) for block in twin.visual.transformer.resblocks]


@pytest.mark.slow
def test_a_compiled_student_learns_the_same_under_the_same_names_and_a_plain_run_goes_on_from_it(recipe_file: Path, tmp_path: Path) -> None:
    sets = (*IMAGES, *KEPT, "optim.schedule=constant")
    plain, out = ran(recipe_file, tmp_path / "plain", *sets), tmp_path / "compiled"
    run = train(recipe_file, "--out", out, sets=(*sets, "student.compile=true"))
    assert run.code == 0, run.err
    assert run.out.count("student.compile: blocks by torch.compile, 2 of its image tower and 1 of its text tower; the first step") == 1
    assert "which images/s does not count: student, image: 2 x ResidualAttentionBlock" in run.out
    _assert_same(out, plain)
    _assert_the_compilers_seconds_are_apart(out)
    gone_on = train(recipe_file, "--out", out, sets=(*sets, "optim.steps=4"))
    assert gone_on.code == 0, gone_on.err
    assert "step 3 of 4" in gone_on.out
    assert "torch.compile" not in gone_on.out
    assert "compiled" not in json.loads((out / RUN).read_text(encoding="utf-8"))["jobs"][-1]


def test_without_a_compiler_one_line_says_so_and_the_run_is_the_plain_one(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ran(recipe_file, tmp_path / "plain", *KD, *KEPT)
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = "compile: there is no C++ compiler (no-such-compiler), so its towers run as without the key; apt-get install g++"
    shown = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*KD, *KEPT, *BOTH))
    assert shown.code == 0, shown.err
    assert shown.out.count(f"student.{said}") == shown.out.count(f"teacher.{said}") == 1
    run = train(recipe_file, "--out", tmp_path / "run", sets=(*KD, *KEPT, *BOTH))
    assert run.code == 0, run.err
    assert run.out.count(f"student.{said}") == run.out.count(f"teacher.{said}") == 1
    assert [row["losses"] for row in rows(tmp_path / "run")] == [row["losses"] for row in rows(plain)]
    assert "compiled" not in json.loads((tmp_path / "run" / RUN).read_text(encoding="utf-8"))["jobs"][-1]


def test_a_dry_run_says_which_blocks_it_would_compile_and_compiles_none(recipe_file: Path, tmp_path: Path) -> None:
    shown = train(recipe_file, "--out", tmp_path / "run", "--dry_run", sets=(*KD, *BLOCKS, *BOTH))
    assert shown.code == 0, shown.err
    assert SAID in shown.out
    assert "teacher.compile: blocks by torch.compile, 1 of its image tower and 1 of its text tower" in shown.out


def test_a_block_whose_attention_is_read_stays_as_it_is(recipe_file: Path) -> None:
    recipe, _ = recipes.load(str(recipe_file), ("student.architecture.vision_cfg.layers=3",))
    assert recipe.student is not None
    model = clip.on_meta(clip.resolve(recipe.student, "student")).clip
    line = compiled.outline(model, "student", World(0, 1, torch.device("cpu")), [Weights(-1), 0])
    assert "2 of its image tower and 1 of its text tower" in line


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("teacher.mode=zero3",), "compile is for a teacher whole on every rank: set mode to replicated"),
        (
            ("teacher.mode=replicated_int8", "teacher.int8_product=onednn"),
            "compile = true: torch compiles no product of int8_product = 'onednn'",
        ),
        (("teacher.store=somewhere",), "compile = true: with store = 'somewhere' the teacher runs only for what the store lacks"),
    ],
)
def test_a_teacher_that_cannot_be_compiled_is_refused_by_name(recipe_file: Path, sets: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=r"compile") as error:
        recipes.load(str(recipe_file), (*KD, "teacher.compile=true", *sets))
    assert said in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets",
    [
        BOTH,
        ("student.compile=true", "student.activation_checkpointing=true"),
        ("teacher.compile=true", "teacher.mode=replicated_int8", "teacher.int8_product=dequantise"),
        ("teacher.compile=true", "teacher.mode=replicated_int8", "teacher.int8_product=int_mm"),
        ("student.compile=true", "objectives.masked_feature=1.0"),
    ],
)
def test_what_is_compiled_changes_rounding_alone(recipe_file: Path, tmp_path: Path, sets: tuple[str, ...]) -> None:
    of_plain = [one for one in sets if not one.split("=")[0].endswith(".compile")]
    plain = ran(recipe_file, tmp_path / "plain", *KD, *BLOCKS, *KEPT, *of_plain)
    _assert_same(ran(recipe_file, tmp_path / "compiled", *KD, *BLOCKS, *KEPT, *sets), plain)


@pytest.mark.slow
def test_the_rehearsal_of_a_gpu_compiles_in_bf16(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAKD_PRECISION", "bf16")
    plain = ran(recipe_file, tmp_path / "plain", *KD, *BLOCKS, *KEPT)
    run = ran(recipe_file, tmp_path / "compiled", *KD, *BLOCKS, *KEPT, *BOTH)
    assert rows(run)[0]["losses"] == pytest.approx(rows(plain)[0]["losses"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("recomputed", ["false", "true"])
def test_two_ranks_train_compiled_as_one_does_plain(recipe_file: Path, tmp_path: Path, stage: int, recomputed: str) -> None:
    sets = (*KD, *BLOCKS, *KEPT, f"student.activation_checkpointing={recomputed}")
    plain = ran(recipe_file, tmp_path / "plain", *sets)
    config = ds_config(tmp_path / "ds.json", zero_optimization=zero(stage))
    out = tmp_path / "compiled"
    ranks = run_ranks(PROGRAM, "--recipe", recipe_file, "--out", out, "--ds_config", config, *settings(*sets, *BOTH), seconds=1200)
    assert SAID in ranks[0]
    assert SAID not in ranks[1]
    _assert_same(out, plain)
