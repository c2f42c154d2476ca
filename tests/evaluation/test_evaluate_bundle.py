"""`megakd evaluate BUNDLE` and `--precision int8`: the same numbers as the run's own, and a model in 8 bit beside itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megakd.runtime.exits import EXIT_USER_ERROR
from support import REPOSITORY
from support.runs import TINY_LLAMA, answering, megakd, ran, run_ranks, settings

PROGRAM = REPOSITORY / "megakd" / "cli" / "__main__.py"


@pytest.fixture(scope="module")
def run(recipe_file: Path, world: Path, evaluations: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("answering") / "run"
    decoder = (f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer")
    return ran(recipe_file, out, *evaluations, *answering(world), *decoder, "optim.steps=3", "evaluation.vqa_batch=16")


def kinds(found: dict[str, Any]) -> dict[str, Any]:
    return {kind: found[kind] for kind in ("zero_shot", "retrieval", "hard_negatives", "vqa")}


def test_a_bundle_has_the_scores_of_its_run_on_one_rank_and_two(run: Path, tmp_path: Path) -> None:
    trained = json.loads((run / "evaluation.json").read_text())
    for ranks in (1, 2):
        out = tmp_path / f"scores{ranks}.json"
        arguments = ("evaluate", run / "bundle", "--recipe", run / "run.json", "--out", out, *settings("data.workers=0"))
        said, *_ = run_ranks(PROGRAM, *arguments, ranks=ranks)
        found = json.loads(out.read_text())
        assert kinds(found) == kinds(trained)
        assert found["bundle"] == str(run / "bundle")
        assert (tmp_path / f"scores{ranks}" / "answers" / "test.jsonl").is_file()
        assert found["models"]["tower"]["parameters"] == trained["parameters"]
        assert found["models"]["decoder"]["bytes"] >= 4 * found["models"]["decoder"]["parameters"]
        assert "vqa test (180 questions)" in said


def test_a_bundle_without_sets_or_with_a_flag_of_another_is_one_message(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ((), "no evaluation set; name some with --set evaluation.vqa.NAME"),
        (("--checkpoint", run), "--checkpoint: is of a run"),
        (("--precision", "int8"), "--precision: goes with --model"),
        (("--pretrained", "x"), "--pretrained: goes with --model"),
    ):
        assert megakd("evaluate", run / "bundle", *arguments) == EXIT_USER_ERROR
        assert message in capsys.readouterr().err


def test_a_model_in_8_bit_is_smaller_and_scores_about_the_same(run: Path, world: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "int8"):
        out = tmp_path / f"{precision}.json"
        wanted = settings(f"evaluation.retrieval.test={world}/test/*.tar", "data.workers=0")
        assert megakd("evaluate", "--model", f"local-dir:{run / 'model'}", "--precision", precision, "--out", out, *wanted) == 0
        found[precision] = json.loads(out.read_text())
    size, small = found["fp32"]["models"]["model"], found["int8"]["models"]["model"]
    assert small["parameters"] == size["parameters"] == found["int8"]["parameters"]
    assert size["bytes"] >= 4 * size["parameters"]
    assert small["bytes"] < 0.8 * size["bytes"]
    assert small["images_per_second"] > 0
    assert found["int8"]["precision"] == "int8"
    near = [one["retrieval"]["test"]["text_to_image"]["R@10"] for one in found.values()]
    assert abs(near[0] - near[1]) < 0.1
