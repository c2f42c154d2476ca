"""Question files that say less than they seem to, or something else, are refused by entry; what is left out or moved is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megakd.recipe import Decoder, strict_json
from megakd.vqa import check
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.prompts import PromptEncoder
from megakd.vqa.sets import QuestionSet
from support import questions as files
from support.questions import opened, source, talk, write, write_images
from support.tokenizers import qwen2, whole_words


def edited(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": 1e999}', "no finite number"),
        ("9" * 5000, "a number that cannot be read"),
        ("[" * 10**5, "nested too deeply"),
        ('["\\ud83d"]', "half a surrogate pair"),
        ("{", "is no JSON"),
    ],
)
def test_json_that_is_not_one_value_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(strict_json.NotStrict, match=reason):
        strict_json.loads(text)
    assert strict_json.loads('["\\ud83d\\ude00", 1.5, {"a": {"a": 1}}]') == ["\U0001f600", 1.5, {"a": {"a": 1}}]


@pytest.mark.parametrize("pattern", ["cat.jpg", "{image_id", "{image_id.real}", "{image_id:9999999999d}", "{}", "{image_id!r}"])
def test_an_image_name_that_is_no_pattern_of_fields_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"answers\.train\.mine: .*image_name = "):
        opened(files.vqav2(tmp_path, image_name=pattern))


def test_images_that_are_not_there_are_named_with_pattern_fields_and_some_that_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"answers\.train\.mine: images = .* lacks 5 images") as error:
        opened(files.vqav2(tmp_path, image_name="{image_id}.png"))
    for word in ("'{image_id}.png'", "image_id, question, question_id", "COCO_val2014_000000000040.jpg", "40.png"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["x" * 10**4 + ".jpg", "a/" * 3000 + "b.jpg"])
def test_a_name_that_is_longer_than_names_may_be_is_a_missing_image(name: str, tmp_path: Path) -> None:
    entries = [{"id": 1, "image": name, "conversations": talk("<image>\nWhat?", "A bus.")}]
    given = source("llava", questions=write(tmp_path / "q.json", entries), images=write_images(tmp_path / "images", "0.jpg"))
    with pytest.raises(ValueError, match="lacks 1 images") as error:
        opened(given)
    assert len(str(error.value)) < 1000


def test_true_is_no_number_of_an_image_and_no_id(tmp_path: Path) -> None:
    given = files.vqav2(tmp_path)
    edited(tmp_path / "questions.json", lambda value: value["questions"][0].update(image_id=True))
    edited(tmp_path / "annotations.json", lambda value: value["annotations"][0].update(image_id=True))
    with pytest.raises(ValueError, match=r"image_name = .* cannot be filled in"):
        opened(given)


@pytest.mark.parametrize("format", ["vqav2", "textvqa", "vizwiz", "gqa", "scienceqa"])
def test_a_question_without_words_is_refused(format: str, tmp_path: Path) -> None:
    given = files.WRITERS[format](tmp_path)

    def blank(value: Any) -> None:
        entries = value if isinstance(value, list) else next((part for part in value.values() if isinstance(part, list)), value)
        entry = entries[0] if isinstance(entries, list) else next(iter(entries.values()))
        entry["question"] = " \n"

    edited(Path(str(given.questions)), blank)
    with pytest.raises(ValueError, match="asks nothing"):
        opened(given)


def test_an_answer_that_is_no_text_is_not_written_out_as_one(tmp_path: Path) -> None:
    given = files.vqav2(tmp_path)
    edited(tmp_path / "annotations.json", lambda value: value["annotations"][0].update(multiple_choice_answer={"a": 1}))
    with pytest.raises(ValueError, match=r'question 1000 has "multiple_choice_answer" = \{\'a\': 1\}: a text is expected'):
        opened(given)


def test_lines_of_pope_end_at_line_breaks_alone_and_ids_are_there_once(tmp_path: Path) -> None:
    given = files.pope(tmp_path)
    path = Path(str(given.questions))
    lines = path.read_text().splitlines()
    path.write_text("\r\n".join([lines[0].replace("snowboard", "snow\u2028board"), lines[1]]), encoding="utf-8")
    assert opened(given)[0].text == "Is there a snow\u2028board in the image?"
    path.write_text("\n".join([lines[0], lines[0]]))
    with pytest.raises(ValueError, match="line 2: question_id = 1: a number or a text, and each once"):
        opened(given)


def test_what_llavas_rules_leave_out_or_move_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = [
        {"id": 1, "image": "0.jpg", "conversations": [*talk("", "Hello.")[1:], *talk("What?", "A bus.", "<image>\nAnd?", "Red.")]},
        {"id": 2, "image": "0.jpg", "conversations": talk("What?<image>", "A bus.", "And?", " ", "So?")},
        {"id": 3, "conversations": talk("What?", " ")},
    ]
    given = source("llava", questions=write(tmp_path / "q.json", entries), images=write_images(tmp_path / "images", "0.jpg"))
    with caplog.at_level(logging.WARNING, "megakd.vqa"):
        questions = opened(given, to_learn=True)
    said = "\n".join(caplog.messages)
    assert "1 conversations begin with a turn of gpt, which is left out" in said
    assert "1 conversations have <image> behind their first question: the image stands before it" in said
    assert "2 turns without a reply are left out" in said
    assert "1 of 3 questions have no answer to learn (3): they are left out" in said
    assert [questions[number].conversation for number in range(2)] == [(("What?", "A bus."), ("And?", "Red.")), (("What?", "A bus."),)]


def _set(*questions: Question) -> QuestionSet:
    return QuestionSet.of("mine", questions, None)


def _ask(number: int, text: str, *turns: tuple[str, str]) -> Question:
    return Question(number, None, text, (turns[0][1],), turns[0][1], "", {}, turns)


def test_lengths_and_cut_turns_are_found_before_a_run(tmp_path: Path) -> None:
    talk = PromptEncoder(qwen2(), Decoder(model="any", template="{question} "), 0, 40)
    long, short = ("yes " * 60, "no"), ("is it?", "yes")
    mixed = _set(*(_ask(number, long[0], long) if number == 3 else _ask(number, short[0], short, long) for number in range(8)))
    found = check.try_training(mixed, talk, False, "answers.train.mine", 0.5)
    assert (found.looked_at, found.bad.counts, found.cut) == (8, {"too_long": 1}, (7, 7))
    first, second = found.sentences("answers.train.mine", learned=True)
    assert "1 of 8 questions looked at are replaced by others: too_long 1; too_long: question 3" in first
    assert "7 of 8 questions looked at are conversations longer than answers.max_length; 7 turns are dropped" in second
    with pytest.raises(ValueError, match=r"evaluation\.vqa\.mine: 1 of 8 questions are unusable .* Raise answers\.max_length"):
        check.try_prompts(mixed, talk, False, "evaluation.vqa.mine", 0.01)


def test_the_remedy_for_questions_that_are_too_long_works(tmp_path: Path) -> None:
    questions = _set(_ask(0, "yes " * 60, ("yes " * 60, "no")))
    lengths = [PromptEncoder(qwen2(), Decoder(model="any", template="{question} "), 0, length) for length in (40, 400)]
    with pytest.raises(ValueError, match=r"Raise answers\.max_length"):
        check.try_training(questions, lengths[0], False, "answers.train.mine", 0.01)
    assert check.try_training(questions, lengths[1], False, "answers.train.mine", 0.01).bad.total == 0


def test_an_answer_that_encodes_to_nothing_is_named_before_the_run() -> None:
    questions = _set(_ask(7, "is it ?", ("is it ?", "yes")), _ask(8, "is it ?", ("is it ?", "violet")))
    talk = PromptEncoder(whole_words(), Decoder(model="any", template="{question}"), 0, 40)
    with pytest.raises(ValueError, match=r"1 of 2 answers looked at encode to nothing but unknown words \(question 8, 'violet'\)"):
        check.try_training(questions, talk, False, "answers.train.mine", 0.4)
    found = check.try_training(questions, talk, False, "answers.train.mine", 0.5)
    assert "1 of 2 questions looked at have an answer of unknown words alone" in found.sentences("answers.train.mine", learned=True)[0]
    nothing = _set(_ask(9, "is it ?", ("is it ?", "\n")))
    with pytest.raises(ValueError, match=r"answers\.train\.mine: question 9: the answer '\\n' encodes to nothing"):
        check.try_training(nothing, talk, False, "answers.train.mine", 1.0)
