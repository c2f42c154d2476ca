"""Student beside teacher in real runs: during training, after it, on two ranks, with a store, with several teachers, and with none."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import support.image_teachers  # noqa: F401  (registers the models)
from megakd import load_model
from megakd.evaluation import report
from megakd.evaluation.diagnostics import compare, pair
from megakd.evaluation.diagnostics.cka import Moments
from megakd.models.embeddings import Embeddings
from megakd.recipe.placements import MODES
from megakd.runtime import checkpoint
from megakd.runtime.exits import EXIT_USER_ERROR
from support.runs import ENSEMBLE, TEACHER, curve, events, finish, launch, megakd, ran, settings, train

TWO_BLOCKS = ("student.architecture.vision_cfg.layers=2", "optim.steps=2", "optim.warmup=1", "evaluation.batch=7", "checkpoint.keep=1")
OWN = ("student.architecture.vision_cfg={ image_size = 48, patch_size = 16, width = 48, layers = 3, head_width = 16 }",)


def pairs(world: Path) -> str:
    return f"evaluation.diagnostics.test={world}/test/*.tar"


@pytest.fixture(scope="module")
def teacher(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another grid and depth than the students'; and their run without a teacher."""
    return ran(
        recipe_file,
        tmp_path_factory.mktemp("teacher") / "run",
        *OWN,
        "student.architecture.embed_dim=20",
        "optim.steps=2",
        "optim.warmup=1",
    )


@pytest.fixture(scope="module")
def run(recipe_file: Path, world: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sets = (*TWO_BLOCKS, f"teacher.model=local-dir:{teacher}/model", "objectives.similarity=1.0", pairs(world), "evaluation.every=1")
    return ran(recipe_file, tmp_path_factory.mktemp("diagnosed") / "run", *sets)


def of_training(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())["diagnostics"]  # type: ignore[no-any-return]


def diagnosed(run: Path, *arguments: object) -> dict[str, Any]:
    assert megakd("diagnose", run, *arguments) == 0
    return json.loads((run / "diagnostics.json").read_text())  # type: ignore[no-any-return]


def test_numbers_are_those_of_the_exported_models_on_the_same_files(run: Path, teacher: Path, world: Path) -> None:
    images, captions = [], []
    for shard in sorted((world / "test").glob("*.tar")):
        with tarfile.open(shard) as opened:
            members = {name: opened.extractfile(name).read() for name in opened.getnames()}  # type: ignore[union-attr]
        for name in members:
            if name.endswith(".jpg"):
                images.append(Image.open(io.BytesIO(members[name])))
                captions.append(members[f"{name[:-4]}.txt"].decode().splitlines()[0])
    seen, maps = [], []
    for folder in (run, teacher):
        model, tokens = load_model(folder, "cpu"), list[Tensor]()
        clip: Any = model.clip
        with clip.visual.transformer.resblocks[-2].register_forward_hook(lambda *call, kept=tokens: kept.append(call[2][:, 1:])):
            image = model.encode_images(images)
        seen.append(Embeddings(image, model.encode_texts(captions), torch.tensor(model.scale)))
        maps.append(torch.cat(tokens))
    own = maps[0].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    smaller = F.interpolate(own, (3, 3), mode="bilinear", antialias=True).permute(0, 2, 3, 1).flatten(0, 2)
    expected = pair.numbers(seen[0], seen[1], Moments.of(smaller, maps[1].flatten(0, 1)))
    found = of_training(run)["test"]
    assert (found.pop("pairs"), found.pop("repeated"), found.pop("unreadable")) == (60, 0, 0)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_each_evaluation_has_them_in_metrics_lines_and_monitors(run: Path) -> None:
    rows = [event["content"] for event in events(run, "evaluation")]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[-1]["diagnostics"] == of_training(run)
    numbers = report.numbers(rows[-1])
    assert numbers["diagnostics/test/cka_patch"] == rows[-1]["diagnostics"]["test"]["cka_patch"]
    assert "diagnostics/test/pairs" not in numbers
    assert re.search(r"diagnostics test \(60 pairs\): linear CKA image 0\.\d+, text 0\.\d+, patch 0\.\d+; mutual", report.lines(rows[-1]))


def test_training_does_not_change_by_what_is_compared(run: Path, recipe_file: Path, teacher: Path, tmp_path: Path) -> None:
    sets = (*TWO_BLOCKS, f"teacher.model=local-dir:{teacher}/model", "objectives.similarity=1.0")
    assert curve(ran(recipe_file, tmp_path / "run", *sets)) == curve(run)


def test_diagnose_gives_what_training_gave(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = diagnosed(run)
    assert (found["step"], found["diagnostics"]) == (2, of_training(run))
    shown = capsys.readouterr().out
    assert re.search(r"^ *student +teacher +both", shown, re.MULTILINE)
    assert re.search(r"^ *cka_image +0\.\d+", shown, re.MULTILINE)
    assert re.search(r"^ *row_entropy +\d\.\d+ +\d\.\d+", shown, re.MULTILINE)


def test_evaluate_keeps_what_it_does_not_compute(run: Path, world: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))  # whose scores other tests read
    before = of_training(run)
    assert megakd("evaluate", run) == 0
    assert of_training(run) == before
    assert megakd("evaluate", run, "--set", f"evaluation.retrieval.test={world}/test/*.tar") == 0
    assert "diagnostics" not in json.loads((run / "evaluation.json").read_text())  # those of other sets


def test_evaluate_drops_the_diagnostics_of_another_set_of_the_name(run: Path, world: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    assert megakd("evaluate", run, "--set", f"evaluation.diagnostics.test={world}/train/*.tar") == 0
    assert "diagnostics" not in json.loads((run / "evaluation.json").read_text())


def test_a_run_without_a_teacher_is_compared_with_any(teacher: Path, run: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    itself = diagnosed(teacher, "--teacher", teacher, "--set", pairs(world))["diagnostics"]["test"]
    for name in ("cka_image", "cka_text_debiased", "cka_patch", "knn_image", "rows_top1", "rows_spearman"):
        assert itself[name] == pytest.approx(1.0), name
    assert itself["rows_kl"] == pytest.approx(0.0, abs=1e-6)
    assert itself["student_effective_temperature"] == pytest.approx(itself["student_temperature"], rel=1e-3)
    other = diagnosed(teacher, "--teacher", run / "model", "--set", pairs(world))["diagnostics"]["test"]
    assert other["cka_image"] == pytest.approx(of_training_or(run, world)["cka_image"], rel=1e-3)
    capsys.readouterr()
    assert megakd("diagnose", teacher, "--set", pairs(world)) == EXIT_USER_ERROR
    assert "its recipe has no [teacher]; give one with --teacher MODEL" in capsys.readouterr().err
    assert megakd("diagnose", teacher, "--teacher", run) == EXIT_USER_ERROR
    assert "names no pairs to compare on; add some with --set evaluation.diagnostics.NAME=SHARDS" in capsys.readouterr().err


def of_training_or(run: Path, world: Path) -> dict[str, Any]:
    return diagnosed(run, "--set", pairs(world))["diagnostics"]["test"]  # type: ignore[no-any-return]


def test_two_ranks_with_a_partitioned_teacher_and_unreadable_pairs_give_what_one_gives(run: Path, world: Path, tmp_path: Path) -> None:
    """The first 13 of 60 pairs are damaged: one rank has nothing to show for three batches, in which the teacher is gathered still."""
    damaged = tmp_path / "damaged.tar"
    with tarfile.open(damaged, "w") as out:
        for shard in sorted((world / "test").glob("*.tar")):
            with tarfile.open(shard) as opened:
                for number, member in enumerate(opened.getmembers()):
                    content = opened.extractfile(member).read()  # type: ignore[union-attr]
                    broken = member.name.endswith(".jpg") and number < 3 * 13
                    content = b"no image" if broken else content
                    member.size = len(content)
                    out.addfile(member, io.BytesIO(content))
    sets = (
        "--set",
        f"evaluation.diagnostics={{ test = '{damaged}' }}",
        "--set",
        "data.max_bad_fraction=0.5",
        "--set",
        "evaluation.batch=4",
    )
    one = diagnosed(run, *sets)["diagnostics"]["test"]
    assert one["unreadable"] == 13
    (run / "diagnostics.json").unlink()
    two = finish(launch("torchrun", "-m", "megakd.cli", "diagnose", run, *sets, "--set", "teacher.mode=zero3"))
    assert two.code == 0, two.out
    assert json.loads((run / "diagnostics.json").read_text())["diagnostics"]["test"] == pytest.approx(one, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "replicated"])
def test_every_placement_gives_the_same_numbers(mode: str, run: Path) -> None:
    lenient = ("teacher.int8_agreement=0",) if mode.endswith("int8") else ()
    found = diagnosed(run, *settings(f"teacher.mode={mode}", *lenient))["diagnostics"]["test"]
    exact = {name: value for name, value in of_training(run)["test"].items() if not re.search("rows_|knn|pairs", name)}
    assert {name: found[name] for name in exact} == pytest.approx(exact, rel=0.1 if mode.endswith("int8") else 1e-4, abs=1e-6)


def test_a_teacher_of_images_alone_has_the_numbers_of_images(
    teacher: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(teacher, tmp_path / "run")
    of_images = ("--teacher", "timm:megakd_tiny_dinov3", "--set", "teacher.pretrained=random", "--set", pairs(world))
    found = diagnosed(tmp_path / "run", *of_images)
    assert found["teachers"] == {"teacher": "timm:megakd_tiny_dinov3"}
    both = {name for name in found["diagnostics"]["test"] if not name.startswith("student_")}
    assert both >= {"cka_image", "cka_image_debiased", "cka_patch", "knn_image", "teacher_effective_rank_image"}
    assert not [name for name in both if "text" in name or name.startswith("rows")]
    assert "evaluation.diagnostics: teacher sees images alone, and so do they" in capsys.readouterr().out


def test_several_teachers_have_a_table_each(recipe_file: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ran(
        recipe_file, tmp_path / "run", *TEACHER, *ENSEMBLE, "objectives.similarity=1.0", pairs(world), "optim.steps=2", "optim.warmup=1"
    )
    found = of_training(run)["test"]
    assert list(found) == ["pairs", "repeated", "unreadable", "teacher", "ensemble.second"]
    assert found["teacher"]["cka_image"] != found["ensemble.second"]["cka_image"]
    assert "cka_patch" not in found["teacher"]
    lines = report.lines(json.loads((run / "evaluation.json").read_text()))
    assert "diagnostics test (60 pairs) beside ensemble.second: linear CKA" in lines
    capsys.readouterr()
    assert diagnosed(run)["diagnostics"]["test"] == found  # random teachers are drawn again
    said = capsys.readouterr().out
    assert "evaluation.diagnostics: no cka_patch with teacher: student: block = -2: the vision tower has 1 blocks" in said


@pytest.mark.parametrize("of", ["all", "text"])
def test_beside_a_store_the_model_is_loaded(of: str, run: Path, recipe_file: Path, world: Path, teacher: Path, tmp_path: Path) -> None:
    sets = (*TWO_BLOCKS, f"teacher.model=local-dir:{teacher}/model", "objectives.similarity=1.0", pairs(world))
    assert megakd("embed", "--recipe", recipe_file, "--out", tmp_path / "store", *settings(*sets)) == 0
    stored = (f"teacher.store={tmp_path}/store", f"teacher.store_of={of}", "teacher.store_miss=fail")
    finished = train(recipe_file, "--out", tmp_path / "run", sets=(*sets, *stored))
    assert finished.code == 0, finished.err
    found, whole = of_training(tmp_path / "run")["test"], of_training_or(run, world)
    if of == "all":
        assert "evaluation.diagnostics: teacher is loaded beside its store, which has no embeddings of these sets" in finished.out
        assert found.keys() == whole.keys()
    else:
        assert "teacher's text tower is not loaded, and its store has no texts of these sets: images alone" in finished.out
        assert {"cka_image", "cka_patch", "knn_image"} <= found.keys()
        assert not {"cka_text", "rows_kl", "teacher_modality_gap"} & found.keys()
    assert found["teacher_effective_rank_image"] == pytest.approx(whole["teacher_effective_rank_image"], rel=1e-3)


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.tar"
    with tarfile.open(next((world / "test").glob("*.tar"))) as opened, tarfile.open(few, "w") as out:
        for member in opened.getmembers()[: 3 * 11]:
            out.addfile(member, opened.extractfile(member))
    kd = (*TEACHER, "objectives.similarity=1.0")
    for sets, message in (
        ((pairs(world),), "evaluation.diagnostics.test: compares the student with its [teacher], and there is none: take it out"),
        ((*TEACHER, pairs(world)), "and no objective with a weight uses it, so it is not loaded"),
        ((*kd, f"evaluation.diagnostics.test={few}"), "evaluation.diagnostics.test: 11 samples; neighbours and ranks need 12"),
        ((*kd, "evaluation.diagnostics.test=nowhere/*.tar"), "evaluation.diagnostics.test: "),
    ):
        finished = train(recipe_file, "--out", tmp_path / "run", sets=sets)
        assert finished.code == EXIT_USER_ERROR
        assert message in finished.err
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_pairs_that_came_before_are_left_out(teacher: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(world / "test" / "00000.tar", tmp_path / "again.tar")
    twice = f"evaluation.diagnostics.test={world}/test/00000.tar::{tmp_path}/again.tar"
    found = diagnosed(teacher, "--teacher", teacher, "--set", twice)["diagnostics"]["test"]
    assert (found["pairs"], found["repeated"]) == (60, 60)
    assert "test: 60 pairs (60 repeated left out)" in capsys.readouterr().out
    contents, lines = [(1, 1), (2, 2), (1, 1), (3, 3), (4, 4)], ["a", "a", "b", "b", "c"]
    assert compare._different(contents, lines) == [0, 3, 4]


def test_an_embedding_that_is_not_finite_ends_the_comparison(run: Path, world: Path, tmp_path: Path, capsys: Any) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    progress, state = checkpoint.load(checkpoint.available(run)[-1])
    (name,) = [name for name in state.weights if name.endswith("text_projection")]
    state.weights[name].fill_(3e38)  # finite, or it would not be saved, and no embedding is
    checkpoint.save(run, replace(progress, step=progress.step + 1), state, keep=1)
    assert megakd("diagnose", run, "--set", pairs(world)) == EXIT_USER_ERROR
    assert "evaluation.diagnostics.test: student's text embeddings are not finite, 60 of 60" in capsys.readouterr().err
