"""`megakd evaluate --model`: any model without a run, by the numbers that a run of its weights gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megakd.runtime.exits import EXIT_USER_ERROR
from support import REPOSITORY
from support.runs import megakd, question_source, ran, run_ranks

PROGRAM = REPOSITORY / "megakd" / "cli" / "__main__.py"


def reader(world: Path, layer: int = -1) -> str:
    asked = f"train = {question_source(world, 'train')}, test = {question_source(world, 'test')}"
    return f"evaluation.reader.test={{ {asked}, layer = {layer}, width = 32, batch = 32, steps = 6 }}"


@pytest.fixture(scope="module")
def run(recipe_file: Path, world: Path, evaluations: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(recipe_file, tmp_path_factory.mktemp("trained") / "run", *evaluations, reader(world), "optim.steps=3")


def scores(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name not in ("step", "model", "pretrained", "images_per_second", "models")}


def test_a_model_has_the_numbers_of_its_run_to_the_last_bit_on_one_rank_and_two(run: Path, tmp_path: Path) -> None:
    model = f"local-dir:{run / 'model'}"
    expected = scores(run / "evaluation.json")
    assert {"zero_shot", "retrieval", "hard_negatives", "reader", "parameters", "sets"} == expected.keys()
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        (said, *_) = run_ranks(PROGRAM, "evaluate", "--model", model, "--recipe", run / "run.json", "--out", out, ranks=ranks)
        assert f"evaluation of {model}:" in said
        assert scores(out) == expected
        assert json.loads(out.read_text())["model"] == model


def test_nothing_is_written_without_out_and_sets_may_come_of_the_command_line(
    run: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in run.iterdir())
    sets = ("--set", f"evaluation.retrieval.mine={world}/test/*.tar", "--set", "data.workers=0")
    assert megakd("evaluate", "--model", f"local-dir:{run / 'model'}", *sets) == 0
    assert "retrieval mine (60 captions of 60 images)" in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == before
    assert not list(tmp_path.iterdir())


def test_a_model_of_images_alone_is_read_and_has_no_sets_of_texts(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", "timm:test_vit", "--pretrained", "random", "--set", "data.workers=0", "--set", reader(world))
    assert megakd("evaluate", *model, "--set", f"evaluation.zero_shot.seen={world}/zeroshot") == EXIT_USER_ERROR
    assert "evaluation.zero_shot.seen: --model timm:test_vit has no text tower" in capsys.readouterr().err
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    for out in (first, again):
        assert megakd("evaluate", *model, "--out", out) == 0
    assert scores(first) == scores(again)  # random weights, too, are drawn by the recipe's seed
    assert scores(first)["reader"]["test"]["questions"] == 180


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a run folder, or a model with --model"),
        (("{run}", "--model", "ViT-B-32"), "give either a run folder, or a model with --model"),
        (("{run}", "--out", "x.json"), "--out: goes with --model"),
        (("--model", "ViT-B-32", "--checkpoint", "x"), "--checkpoint: is of a run"),
        (("--model", "ViT-B-32"), "--model ViT-B-32: teacher.pretrained: missing"),
        (("--model", "ViT-B-33", "--pretrained", "random"), "open_clip has no such model"),
        (("--model", "{model}"), "no evaluation set: name some with --set"),
        (
            ("--model", "{model}", "--set", "optim.lr=1"),
            "--set optim.lr=1: a model without a run is scored by seed, data",
        ),
        (("--model", "{model}", "--set", "evaluation.retreival.x=y"), "did you mean 'evaluation.retrieval'"),
        (("--model", "{model}", "--recipe", "no_such"), "recipe 'no_such': not a shipped recipe"),
        (("--model", "{model}", "--set", "evaluation.retrieval.x=y", "--out", "."), "--out .: a folder"),
    ],
)
def test_what_cannot_be_scored_is_one_message(
    run: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert megakd("evaluate", *(part.format(run=run, model=f"local-dir:{run / 'model'}") for part in arguments)) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error
