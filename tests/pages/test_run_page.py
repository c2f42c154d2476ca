"""`megakd report RUN` on real tiny runs: of pairs, of questions, resumed, failed; and on names that are markup."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megakd.cli import app
from megakd.pages.page import Card, Cards, Line, Page, Picture, Section, as_html, as_markdown
from megakd.pages.run import health, reading
from megakd.pages.run.page import compose
from megakd.pages.texts import clean
from megakd.runtime.run_folder import read_metrics
from support import edit_json
from support.run_pages import write_long_run
from support.runs import KD, TINY_LLAMA, answering, ran, rows, train
from support.study_folders import Page as ReadPage

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} |pipe| `code` $x_1$ \ud800\x00 ]]> ' + "x" * 600


def report(*arguments: Path | str) -> str:
    finished = CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)
    assert finished.exit_code == 0, finished.output
    return finished.output


def page_of(run: Path, *, examples: bool = True) -> Page:
    """Without its files, which take seconds."""
    return compose(reading.read(run), [], examples=examples)


def cards_of(page: Page) -> dict[str, Cards]:
    return {part.key: part for part in page.parts() if isinstance(part, Cards)}


def texts_of(page: Page) -> str:
    return " ".join(text for section in page.sections for text in section.texts)


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder))


@pytest.fixture(scope="module")
def resumed(recipe_file: Path, evaluations: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pairs that was killed behind step 4, went on from there, and was evaluated at steps 2, 4 and 6; with its page."""
    folder = tmp_path_factory.mktemp("resumed") / "pairs"
    sets = (*KD, *evaluations, "evaluation.every=2")
    ran(recipe_file, folder, *sets)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    shutil.rmtree(folder / "model")
    edit_json(folder / "run.json", lambda run: run["jobs"][0].pop("ended"))  # as a kill leaves it
    ran(recipe_file, folder, *sets)
    report(folder)
    return folder


@pytest.fixture(scope="module")
def asked(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a decoder beside the student, of two steps."""
    decoder = (f"decoder.tokenizer={world}/tokenizer", f"decoder.architecture={TINY_LLAMA}")
    folder = tmp_path_factory.mktemp("asked") / "questions"
    retrieval = f"evaluation.retrieval={{ test = '{world}/test/*.tar' }}"
    return ran(recipe_file, folder, *answering(world), *decoder, retrieval, "optim.steps=2", "optim.warmup=0")


def test_each_evaluation_and_each_start_is_kept_once_and_the_page_marks_where_the_run_went_on(resumed: Path) -> None:
    assert [row["step"] for row in rows(resumed)] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_metrics(resumed) if row.get("event") == "evaluation"] == [2, 4, 6]
    starts = json.loads((resumed / "run.json").read_text())["jobs"]
    assert [start["from_step"] for start in starts] == [0, 4]
    assert starts[1]["ended"]["how"] == "finished"
    run = reading.read(resumed)
    assert run.resumed_at == [4]
    shown = ReadPage.read(resumed / "report.html")
    assert [[cell.text for cell in row][2:3] for row in shown.tables["starts"][1:]] == [["0"], ["4"]]
    assert shown.tables["starts"][1][-1].text == "no word"
    assert "Dashed: where a later start went on, step 4." in shown.shown


def test_the_page_says_the_scores_of_evaluation_json_and_has_a_curve_of_every_number(resumed: Path) -> None:
    shown = ReadPage.read(resumed / "report.html")
    scores = json.loads((resumed / "evaluation.json").read_text())
    recall, top1 = scores["retrieval"]["test"]["mean_R@1"], scores["zero_shot"]["seen"]["top1"]
    by_title = {row[0].text: row for row in shown.tables["scores"][1:]}
    assert float(by_title["retrieval test, mean R@1"][1].value or "") == recall
    assert by_title["zero-shot seen, top-1"][1].text == f"{100 * top1:.1f}"
    assert by_title["zero-shot seen, top-1"][4].text == "3"
    assert f"{100 * recall:.1f} %" in shown.shown
    assert "Finished: 6 steps" in shown.shown
    objectives = {"loss", "weighted", "raw_0", "raw_1", "raw_2"}
    assert {*objectives, "rate", "norm", "scale", "time", "throughput", "memory"} <= set(shown.figures)
    assert sum(name.startswith("score_") for name in shown.figures) >= 3
    names = [figure.title for figure in page_of(resumed, examples=False).figures() if figure.key.startswith("raw_")]
    assert names == ["contrastive", "similarity", "feature"]
    assert [row[0].text for row in shown.tables["checkpoints"][1:]] == ["2", "4", "6"][-len(shown.tables["checkpoints"][1:]) :]
    assert "data.train" in {row[0].text for row in shown.tables["recipe"]}


def test_files_of_the_page_are_in_the_run_folder_small_and_of_one_kind(resumed: Path) -> None:
    text, shown = (resumed / "report.html").read_text(encoding="utf-8"), ReadPage.read(resumed / "report.html")
    files = {path.name for path in (resumed / "figures").iterdir()}
    assert {name for name in files if name.endswith(".svg")} == {f"{name}.svg" for name in shown.figures}
    assert sum(name.endswith(".jpg") for name in files) == shown.tags.count("img") > 10
    assert "default-src 'none'; img-src data:; style-src" in text
    assert not re.search(r"""(src|href)=["'](?!#|data:image/jpeg;base64,)""", text)
    assert len(text.encode()) < 3_000_000
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert sorted(ids) == sorted(set(ids))
    linked = re.findall(r"\]\(figures/([^)]+)\)", (resumed / "report.md").read_text(encoding="utf-8"))
    assert set(linked) == files


def test_neighbours_are_those_of_the_newest_checkpoint_with_the_right_ones_marked(resumed: Path) -> None:
    page = page_of(resumed)
    assert "60 of the 60 pairs of test, evenly spaced, embedded by the student of step 6." in texts_of(page)
    cards = cards_of(page)
    assert {"images_even", "images_missed", "captions_even", "captions_missed"} == cards.keys()
    recall = json.loads((resumed / "evaluation.json").read_text())["retrieval"]["test"]
    [share] = re.findall(r"right for ([\d.]+) %", cards["captions_even"].caption)
    assert float(share) >= round(100 * recall["text_to_image"]["R@1"], 1)  # which counts a sentence of several pairs as one
    for card in cards["images_even"].cards:
        right = [line for line in card.lines[:3] if line.mark == "good"]
        assert bool(right) == (card.lines[-1].term != "its own")
        assert right or card.lines[3].text in (card.picture.alt if card.picture else "")
    assert all(card.lines[0].mark == "bad" for card in cards["images_missed"].cards)
    assert all(len(card.found) == 3 + all(one.mark == "bad" for one in card.found[:3]) for card in cards["captions_even"].cards)


def test_questions_have_picture_answer_and_truth_as_the_files_have_them(asked: Path, world: Path) -> None:
    cards = cards_of(page_of(asked))
    even, wrong = cards["questions_0_even"].cards, cards["questions_0_wrong"].cards
    assert (len(even), len(wrong)) == (12, 6)
    answers = [json.loads(line) for line in (asked / "answers" / "test.jsonl").read_text().splitlines()[1:]]
    texts = {one["question_id"]: one["question"] for one in json.loads((world / "questions/test_questions.json").read_text())["questions"]}
    truths = {
        one["question_id"]: {given["answer"] for given in one["answers"]}
        for one in json.loads((world / "questions/test_annotations.json").read_text())["annotations"]
    }
    for card, row in ((even[0], answers[0]), (even[-1], answers[-1])):
        assert card.lines[0].text == texts[row["question_id"]]
        assert card.lines[1].text == " ".join(row["answer"].split()) or card.lines[1].text == "nothing"
        assert set(card.lines[2].text.split(", ")) <= truths[row["question_id"]]
        assert card.picture
        assert card.picture.jpeg.startswith(b"\xff\xd8\xff")
    assert all(card.lines[1].mark != "good" for card in wrong)


@pytest.fixture
def spoilt(asked: Path, tmp_path: Path) -> Path:
    return copied(asked, tmp_path / "run")


def test_what_is_gone_is_said_and_the_rest_of_the_page_is_made(spoilt: Path, tmp_path: Path) -> None:
    def source(**changed: str) -> None:
        edit_json(spoilt / "run.json", lambda run: run["recipe"]["evaluation"]["vqa"]["test"].update(changed))

    source(images=f"{tmp_path}/gone/*.tar")
    page = page_of(spoilt)
    assert "Pictures are not shown: evaluation.vqa.test" in texts_of(page)
    assert all(card.picture is None for card in cards_of(page)["questions_0_even"].cards)
    source(questions=f"{tmp_path}/gone.json")
    edit_json(spoilt / "run.json", lambda run: run["recipe"]["evaluation"]["retrieval"].update(test=f"{tmp_path}/none/*.tar"))
    page = page_of(spoilt)
    assert "Questions of test are not shown: evaluation.vqa.test" in texts_of(page)
    assert "Neighbours in test are not shown: evaluation.retrieval.test" in texts_of(page)
    assert cards_of(page) == {}
    assert {figure.key for figure in page.figures()} > {"loss", "throughput"}


def test_without_a_checkpoint_the_written_student_is_asked_and_without_both_that_is_said(spoilt: Path) -> None:
    shutil.rmtree(spoilt / "checkpoints")
    assert "embedded by the student of model/." in texts_of(page_of(spoilt))
    shutil.rmtree(spoilt / "model")
    shutil.rmtree(spoilt / "answers")
    page = page_of(spoilt)
    assert "has no checkpoint and no model/ yet." in texts_of(page)
    assert "Questions of test have no answers yet." in texts_of(page)
    assert cards_of(page_of(spoilt, examples=False)) == {}
    assert "Neighbours" not in texts_of(page_of(spoilt, examples=False))


def test_answers_to_a_file_that_was_changed_are_counted(spoilt: Path, world: Path, tmp_path: Path) -> None:
    changed = copied(world / "questions", tmp_path / "questions")

    def renumber(name: str, key: str) -> None:
        edit_json(changed / name, lambda content: [one.update(question_id=one["question_id"] + 10**6) for one in content[key][:5]])

    renumber("test_questions.json", "questions")
    renumber("test_annotations.json", "annotations")
    of_test = {"questions": str(changed / "test_questions.json"), "annotations": str(changed / "test_annotations.json")}
    edit_json(spoilt / "run.json", lambda run: run["recipe"]["evaluation"]["vqa"]["test"].update(of_test))
    assert "5 of 180 answers to test are to other questions than its file has now" in texts_of(page_of(spoilt))


def test_a_run_that_failed_has_its_last_words_on_its_page(recipe_file: Path, tmp_path: Path) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", sets=("optim.lr=1e30", "optim.clip=0.0", "optim.warmup=0"))
    assert finished.code == 86
    page = page_of(tmp_path / "run")
    assert page.verdict.startswith("Failed at step ")
    assert page.tone == "bad"
    assert "not finite" in page.sentences[0]
    assert page.sentences[0].splitlines()[0] in finished.err


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    more = {"name": HOSTILE, "data": {"train": HOSTILE}, "objectives": {HOSTILE: 1.0}, "student": {"model": HOSTILE}}
    more["evaluation"] = {"retrieval": {HOSTILE: HOSTILE}, "vqa": {HOSTILE: HOSTILE}}
    folder = write_long_run(tmp_path / "run", more, argv=[HOSTILE], commit=HOSTILE, device=HOSTILE, versions={HOSTILE: HOSTILE})
    edit_json(folder / "run.json", lambda run: run["jobs"][1].update(ended={"how": "failed", "words": HOSTILE}, nodes=HOSTILE))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").replace('"contrastive"', json.dumps(HOSTILE))
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    report(folder)
    text, shown = (folder / "report.html").read_text(encoding="utf-8"), ReadPage.read(folder / "report.html")
    assert shown.tags.count("script") == 1
    assert "img" not in shown.tags
    assert "img-src" not in text
    assert "{{ 7 * 7 }}" in shown.shown
    for picture in (folder / "figures").glob("*.svg"):
        ElementTree.parse(picture)
    for line in (folder / "report.md").read_text(encoding="utf-8").splitlines():
        assert not re.search(r"(?<!\\)<(script|img)", line)


def test_hostile_captions_and_answers_are_text_too() -> None:
    said = clean(HOSTILE)
    card = Card(Picture("question_0_0", b"\xff\xd8", said, said, "bad"), (Line(said, said, "good"),))
    section = Section("s", said, (Cards("k", said, said, (card,)),))
    page = Page(title=said, question=said, verdict=said, sentences=(said,), command=said, sections=(section,))
    assert [as_html(page).count(tag) for tag in ("<script", "<img")] == [1, 1]
    assert not re.search(r"(?<!\\)<(script|img)", as_markdown(page))


def test_the_page_may_lie_elsewhere_and_files_of_others_stay(tmp_path: Path) -> None:
    folder = write_long_run(tmp_path / "run")
    said = report(folder, "--out", tmp_path / "page", "--no_examples")
    assert said == f"Finished: 40 steps. VQA test 40.0 %; retrieval test, mean R@1 30.0 %\n{tmp_path}/page/report.html\n"
    assert not (folder / "report.html").exists()
    assert health.verdict(reading.read(folder))[0] in (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    (tmp_path / "page" / "figures" / "mine.svg").write_text("")
    with pytest.raises(ValueError, match=r"figures holds files that no report wrote \(mine.svg\); choose another --out"):
        report(folder, "--out", tmp_path / "page", "--no_examples")
    with pytest.raises(ValueError, match=r"--no_examples: .* is not one run folder"):
        report(folder, folder, "--no_examples")
