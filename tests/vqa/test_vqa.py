"""Questions put to a real tiny decoder with an open_clip tower: batches, ranks, interruptions, damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.data.shapes.vocabulary import write_tokenizer
from megakd.recipe import Evaluation, QuestionSource, Recipe
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.vqa import evaluate
from support import PROGRAMS
from support import questions as files
from support.forked import Forked
from support.programs.vqa import QUESTIONS, answerer, run
from support.runs import finish, start_ranks, wait_for
from support.shards import data

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def undisturbed(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("undisturbed")
    return out, run(sets, out, ALONE, 8, 0.0)[0]


def answers(out: Path, name: str = "vqav2") -> list[dict[str, Any]]:
    _, *rows = (out / "answers" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


def start(sets: Path, out: Path, seconds: float) -> list[Forked]:
    return start_ranks(sets, out, str(seconds), program=PROGRAMS / "vqa.py")


def test_every_question_is_answered_and_answers_differ(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    out, results = undisturbed
    assert results["vqav2"]["questions"] == QUESTIONS
    assert results["vqav2"]["unusable"] == 0
    assert set(results["vqav2"]["by_family"]) == {"what 0", "what 1"}
    assert len({row["answer"] for row in answers(out)}) > 5  # or equality of answers below would mean nothing
    assert json.loads((out / "vqa.json").read_text())["sets"] == results
    written = {path.name for path in (out / "answers").iterdir()}
    assert written == {"vqav2.jsonl", "vqav2.submission.json", "pope.jsonl", "pope.submission.jsonl"}


def test_answers_are_the_same_for_batches_of_one_and_of_eight(sets: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    results, asked = run(sets, tmp_path, ALONE, 1, 0.0)
    assert results == undisturbed[1]
    assert answers(tmp_path) == answers(undisturbed[0])
    assert asked == QUESTIONS + len(answers(tmp_path, "pope"))


def test_two_ranks_answer_as_one_also_after_both_were_killed(sets: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    ranks = start(sets, tmp_path, 0.3)

    def lines() -> list[int]:
        return [len(path.read_text().splitlines()) - 1 for path in sorted((tmp_path / "answers").glob("vqav2.rank*.jsonl"))]

    try:
        wait_for(lambda: len(lines()) == 2 and min(lines()) >= 3, ranks[0])
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    kept = sum(lines())
    assert 6 <= kept < QUESTIONS
    finished = [finish(rank) for rank in start(sets, tmp_path, 0.0)]
    assert [rank.code for rank in finished] == [0, 0], finished[0].out[-3000:]
    assert json.loads((tmp_path / "vqa.json").read_text())["sets"] == undisturbed[1]
    assert answers(tmp_path) == answers(undisturbed[0])
    results, asked = run(sets, tmp_path, ALONE, 8, 0.0)
    assert (results, asked) == (undisturbed[1], 0)


def test_only_questions_without_an_answer_are_asked(sets: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run(sets, tmp_path, ALONE, 8, 0.0)
    path = tmp_path / "answers" / "vqav2.jsonl"
    head, *rows = path.read_text().splitlines()
    (tmp_path / "answers" / "vqav2.rank7.jsonl").write_text("\n".join([head, *rows[10:14]]) + "\n")  # of a start on more ranks
    path.write_text("\n".join([head, *rows[:4]]) + "\n")
    results, asked = run(sets, tmp_path, ALONE, 8, 0.0)
    assert (results, asked) == (undisturbed[1], QUESTIONS - 8)
    assert not list((tmp_path / "answers").glob("*.rank*"))


def test_damaged_lines_are_asked_again(sets: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run(sets, tmp_path, ALONE, 8, 0.0)
    path = tmp_path / "answers" / "vqav2.jsonl"
    head, *rows = path.read_text().splitlines()
    said = [json.loads(row)["answer"] for row in rows]
    other = next(index for index in (0, 1, 2, 4) if said[index] != said[5])
    rows[5] = rows[5].replace('"index": 5', f'"index": {other}')  # another question's answer
    rows[3] = rows[3][:20]  # cut off
    rows[9] = '{"index": 9, "question_id": 1009, "answer": 3}'
    rows[11] = '{"index": 4000, "question_id": 1011, "answer": "red"}'
    rows[-1] = rows[-1][:-2]
    path.write_bytes("\n".join([head, *rows]).encode() + b"\n\xff\xfe\n[]")
    results, asked = run(sets, tmp_path, ALONE, 8, 0.0)
    assert (results, asked) == (undisturbed[1], 5)
    assert answers(tmp_path) == answers(undisturbed[0])


def test_a_damaged_header_or_another_model_starts_anew(sets: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    everything = QUESTIONS + len(answers(undisturbed[0], "pope"))
    run(sets, tmp_path, ALONE, 8, 0.0)
    assert run(sets, tmp_path, ALONE, 8, 0.0, seed=1)[1] == everything
    assert run(sets, tmp_path, ALONE, 8, 0.0)[1] == everything
    path = tmp_path / "answers" / "vqav2.jsonl"
    path.write_text("{" + path.read_text())
    assert run(sets, tmp_path, ALONE, 8, 0.0)[1] == QUESTIONS
    (tmp_path / "answers" / "vqav2.jsonl").write_bytes(b"")
    assert run(sets, tmp_path, ALONE, 8, 0.0) == (undisturbed[1], QUESTIONS)


def test_the_image_matters_and_a_blind_decoder_answers_too(sets: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    blind, asked = run(sets, tmp_path, ALONE, 8, 0.0, blind=True)
    assert asked == QUESTIONS + len(answers(tmp_path, "pope"))
    assert blind["vqav2"]["questions"] == QUESTIONS
    assert [row["answer"] for row in answers(tmp_path)] != [row["answer"] for row in answers(undisturbed[0])]


def test_submissions_are_in_the_benchmarks_format(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    out, results = undisturbed
    sent = json.loads((out / results["vqav2"]["submission"]).read_text())
    assert [entry["question_id"] for entry in sent] == [1000 + number for number in range(QUESTIONS)]
    assert all(set(entry) == {"question_id", "answer"} for entry in sent)
    said = [json.loads(line) for line in (out / results["pope"]["submission"]).read_text().splitlines()]
    assert [entry["answer"] for entry in said] == [row["answer"] for row in answers(out, "pope")]


def with_a_cut_image(folder: Path, name: str) -> tuple[dict[str, evaluate.Opened], Callable[[], object]]:
    """A set in which six questions' image is cut off, and how to repair it."""
    source = files.vqav2(folder)
    broken = sorted((folder / "images").iterdir())[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    return {name: evaluate.Opened(source, files.opened(source, f"evaluation.vqa.{name}"))}, lambda: broken.write_bytes(whole)


def test_a_question_that_cannot_be_asked_is_counted_as_wrong(sets: Path, tmp_path: Path) -> None:
    opened, _ = with_a_cut_image(tmp_path / "set", "own")
    allowed = data("unused.tar", max_bad_fraction=0.2)
    results = evaluate.evaluate(opened, answerer(sets, 8), ALONE, tmp_path / "out", allowed, StopPoller(ALONE))
    lost = [row for row in answers(tmp_path / "out", "own") if "unusable" in row]
    assert results["own"]["unusable"] == len(lost) == 6  # three questions an image, five images for ten times three
    assert all(row["answer"] == "" and "corrupt_image" in row["unusable"] for row in lost)
    assert results["own"]["questions"] == QUESTIONS
    assert len(json.loads((tmp_path / "out" / results["own"]["submission"]).read_text())) == QUESTIONS
    assert "of 30 questions (VQA accuracy), 6 could not be asked" in evaluate.lines(results)
    assert any("6 of 30 questions could not be asked" in caveat for caveat in results["own"]["caveats"])


def test_a_set_of_too_many_bad_images_is_scored_once_repaired(sets: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    opened, repair = with_a_cut_image(tmp_path / "set", "vqav2")
    said = r"^evaluation\.vqa\.vqav2: 6 of 30 questions are unusable .*data\.max_bad_fraction = 0\.01: corrupt_image 6\. .*question 1000: "
    with pytest.raises(ValueError, match=said):
        evaluate.evaluate(opened, answerer(sets, 8), ALONE, tmp_path / "out", data("unused.tar"), StopPoller(ALONE))
    assert not (tmp_path / "out" / "vqa.json").exists()
    repair()
    again = answerer(sets, 8)
    results = evaluate.evaluate(opened, again, ALONE, tmp_path / "out", data("unused.tar"), StopPoller(ALONE))
    assert again.decoder.asked == 6  # type: ignore[attr-defined]
    assert results["vqav2"] == undisturbed[1]["vqav2"]
    assert answers(tmp_path / "out") == answers(undisturbed[0])


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("pairs", files.source("captions", images="x/*.tar"), r"evaluation\.vqa\.pairs\.format = 'captions'"),
        ("coco", files.source("vqav2", questions="gone/none.json"), r"evaluation\.vqa\.coco: .*none\.json: no such file"),
    ],
)
def test_captions_and_a_missing_set_are_refused_with_their_key(name: str, source: QuestionSource, said: str) -> None:
    recipe = Recipe.model_construct(data=data("unused.tar"), evaluation=Evaluation(vqa={name: source}))
    with pytest.raises(ValueError, match=said):
        evaluate.open_sets(recipe, ALONE, sees=True)


def test_results_are_said_in_a_few_lines(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    said = evaluate.lines(undisturbed[1])
    assert "vqa vqav2: 0.0% of 30 questions (VQA accuracy)" in said
    assert "what 0 0.0%, what 1 0.0%" in said
