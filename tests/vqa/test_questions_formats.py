"""Each benchmark's file is read as it is published, and refused with a remedy when it is not what the recipe says."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megakd.recipe import QuestionSource
from megakd.recipe.vqa import BENCHMARKS
from megakd.vqa import benchmarks
from megakd.vqa.benchmarks import benchmark, parse
from megakd.vqa.benchmarks.base import Benchmark, Question, most_frequent
from support import questions as files
from support.questions import source, talk, vqav2_entries, write


def read(source: QuestionSource) -> list[Question]:
    return list(parse(source)[0])


def test_vqav2_joins_questions_and_annotations(tmp_path: Path) -> None:
    questions = read(files.vqav2(tmp_path, 9))
    assert len(questions) == 9
    one = questions[4]
    assert (one.question_id, one.text, one.answer) == (1004, "what is the number of question 4?", "answer 4")
    assert one.answers == ("answer 4",) * 7 + ("other", "other", "third")
    assert one.image == "COCO_val2014_000000000041.jpg"
    assert one.family == "what 0"
    assert one.meta == {"image_id": 41, "answer_type": "number", "question_type": "what 0"}
    assert one.short
    assert one.conversation == ((one.text, one.answer),)


def test_vqav2_without_annotations_is_a_test_set_whose_images_are_test2015s(tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", {"data_subtype": "test-dev2015", "questions": vqav2_entries(2)[0]})
    question = read(source("vqav2", questions=path))[0]
    assert (question.answers, question.answer, question.image) == ((), "", "COCO_test2015_000000000040.jpg")


def test_okvqa_has_no_multiple_choice_answer_and_trains_the_most_frequent(tmp_path: Path) -> None:
    asked, answered = vqav2_entries(1)
    answered[0]["answers"] = [{"answer_id": 1, "raw_answer": "racing", "answer": "race", "answer_confidence": "yes"}] * 3
    answered[0]["answers"] += files.ten("motocross", "motocross", "motocross", "motocross")
    del answered[0]["multiple_choice_answer"]
    paths = write(tmp_path / "q.json", {"questions": asked}), write(tmp_path / "a.json", {"annotations": answered})
    (question,) = read(source("vqav2", questions=paths[0], annotations=paths[1], image_name="{image_id}"))
    assert question.answer == "motocross"
    assert question.answers[:4] == ("race", "race", "race", "motocross")
    assert most_frequent(["b", "a", "a", "b"]) == "b"


def test_textvqa_vizwiz_gqa_and_pope(tmp_path: Path) -> None:
    (text,) = read(files.textvqa(tmp_path / "t"))
    assert (text.question_id, text.image, text.answer, len(text.answers)) == (34602, "0054c91397f2fe05.jpg", "stop", 4)
    grey, none = read(files.vizwiz(tmp_path / "v"))
    assert (grey.question_id, grey.image, grey.answer, grey.meta["answerable"]) == ("VizWiz_val_00000000.jpg", grey.question_id, "grey", 1)
    assert (none.family, none.answer, none.meta["answerable"]) == ("unanswerable", "unanswerable", 0)
    verify, query = read(files.gqa(tmp_path / "g"))
    assert (verify.question_id, verify.image, verify.answers, verify.family) == ("05515938", "2370799.jpg", ("no",), "verify")
    assert (query.family, query.meta["types"]["semantic"]) == ("query", "attr")
    yes, no = read(files.pope(tmp_path / "p"))
    assert (yes.answer, no.answer, no.question_id, no.text) == ("yes", "no", 2, "Is there a backpack in the image?")
    assert all(question.short for question in (text, grey, verify, yes))


def test_scienceqa_has_lettered_choices_a_split_and_questions_without_image(tmp_path: Path) -> None:
    north, gas = read(files.scienceqa(tmp_path))
    assert north.text == (
        "Context: N/A\nQuestion: Which is north?\nOptions: (A) Maine (B) Ohio\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (north.answer, north.image, north.family) == ("A", "test/1/image.png", "social science")
    assert gas.text.startswith("Context: Look.\nQuestion: Which is a gas?\nOptions: (A) ice (B) steam (C) rain\n")
    assert (gas.answers, gas.image, gas.meta["choices"]) == (("B",), None, ["ice", "steam", "rain"])
    assert not gas.short
    assert len(read(files.scienceqa(tmp_path, split="train"))) == 1


def test_seed_bench_has_its_four_choices_and_images_alone(tmp_path: Path) -> None:
    towels, what = read(files.seed(tmp_path))
    assert towels.text == (
        "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (towels.question_id, towels.image, towels.answer, towels.family) == ("101669", "1454426_2591111986", "A", "Instances Counting")
    assert (what.answers, what.family, what.short) == (("D",), "Scene Understanding", False)
    assert [benchmark("seed").score(what, said) for said in ("D", "D.", "d", "A")] == [1.0, 0.0, 0.0, 0.0]
    video = files.seed_entry(question_id="v1738", question_type_id=10, data_id="94328.webm", data_type="video")
    path = write(tmp_path / "both.json", {"questions": [files.seed_entry(), video], "question_type": {}})
    questions, file = parse(source("seed", questions=path))
    assert ([one.question_id for one in questions], file.notes) == (["101669"], ["1 questions about videos are left out"])


def test_plain_conversations_are_captions_as_in_llavas_first_stage(tmp_path: Path) -> None:
    entry = {"id": "004539375", "image": "00453/004539375.jpg", "conversations": talk("Describe it.\n<image>", "select luxury furniture")}
    (one,) = read(QuestionSource(format="llava", questions=str(write(tmp_path / "lcs.json", [entry])), plain=True))
    assert (one.conversation, one.answer, one.image) == ((("", "select luxury furniture"),), "select luxury furniture", entry["image"])


def test_llava_has_turns_no_mark_and_entries_without_image(tmp_path: Path) -> None:
    bus, haiku, red = read(files.llava(tmp_path))
    assert bus.turns == (("What is it?", "A bus."), ("What colour?", "Red."))
    assert (bus.text, bus.answers, bus.image) == ("What is it?", ("A bus.",), "coco/0.jpg")
    assert (haiku.image, haiku.turns) == (None, (("Write a haiku.", "Leaves fall."),))
    assert red.text == "Is it {red}?"
    assert not bus.short


def test_llava_leaves_out_a_leading_gpt_and_turns_without_a_reply(tmp_path: Path) -> None:
    first = {"id": 1, "conversations": [{"from": "gpt", "value": "Hello"}, *talk("a", "b", "c")]}
    alone = {"id": 2, "conversations": talk("what is it?")}
    silent = {"id": 3, "conversations": talk("a", "", "b", " \n", "c", "d", "e")}
    questions = read(source("llava", questions=write(tmp_path / "l.json", [first, alone, silent])))
    assert questions[0].turns == (("a", "b"),)
    assert (questions[1].turns, questions[1].answers) == ((("what is it?", ""),), ())
    assert (questions[2].turns, questions[2].answer) == ((("c", "d"),), "d")


def test_scienceqa_has_single_spaces_as_in_llavas_prompts(tmp_path: Path) -> None:
    problem = {"question": "Which  one? ", "choices": ["a ", " b"], "answer": 1, "hint": " Look  here. ", "image": None}
    write(tmp_path / "pid_splits.json", {"val": ["1"]})
    (question,) = read(source("scienceqa", questions=write(tmp_path / "problems.json", {"1": problem}), split="val"))
    assert question.text == (
        "Context: Look here.\nQuestion: Which one? \nOptions: (A) a (B) b\nAnswer with the option's letter from the given choices directly."
    )


def test_a_field_that_is_null_is_a_field_that_is_missing(tmp_path: Path) -> None:
    asked, answered = vqav2_entries(1)
    answered[0]["answers"] = None
    paths = write(tmp_path / "q.json", {"questions": asked}), write(tmp_path / "a.json", {"annotations": answered})
    (vqav2,) = read(source("vqav2", questions=paths[0], annotations=paths[1], image_name="{image_id}"))
    (vizwiz,) = read(source("vizwiz", questions=write(tmp_path / "v.json", [{"image": "a.jpg", "question": "?", "answers": None}])))
    text = {"data": [{"question_id": 1, "image_id": "a", "question": "?", "answers": None}]}
    (textvqa,) = read(source("textvqa", questions=write(tmp_path / "t.json", text)))
    assert vqav2.answers == vizwiz.answers == textvqa.answers == ()
    entry = {"question": "?", "imageId": "7", "answer": "no", "types": None, "groups": None, "isBalanced": None, "entailed": None}
    (gqa,) = read(source("gqa", questions=write(tmp_path / "g.json", {"1": entry})))
    assert (gqa.family, gqa.meta) == ("", {"types": {}, "groups": {}, "isBalanced": True, "entailed": []})


@pytest.mark.parametrize(("is_there", "said"), list(itertools.permutations(files.WRITERS, 2)))
def test_a_file_of_another_format_is_named_with_the_format_it_looks_like(tmp_path: Path, is_there: str, said: str) -> None:
    path = files.WRITERS[is_there](tmp_path).questions
    split = "test" if said == "scienceqa" else None
    with pytest.raises(ValueError, match=rf"it looks like {is_there}: set format = '{is_there}' instead of '{said}'"):
        read(source(said, questions=path, split=split))


def test_annotations_given_as_questions_and_the_reverse_are_told(tmp_path: Path) -> None:
    given = files.vqav2(tmp_path)
    with pytest.raises(ValueError, match="looks like VQAv2's annotations: name it under annotations"):
        read(source("vqav2", questions=given.annotations))
    with pytest.raises(ValueError, match=r'questions\.json has no list "annotations"'):
        read(source("vqav2", questions=given.questions, annotations=given.questions))


def test_ids_that_do_not_match_are_counted_and_named_on_both_sides(tmp_path: Path) -> None:
    asked, answered = vqav2_entries(9)
    questions = write(tmp_path / "q.json", {"questions": asked[2:]})
    annotations = write(tmp_path / "a.json", {"annotations": answered[:5]})
    said = r"4 of 7 questions have no annotation \(1005, 1006, 1007, \.\.\.\), 2 of 5 annotations have no question \(1000, 1001\)"
    with pytest.raises(ValueError, match=said):
        read(source("vqav2", questions=questions, annotations=annotations))


@pytest.mark.parametrize(("questions", "annotations"), [(5, 6), (6, 5)])
def test_a_single_id_that_is_missing_on_either_side_is_an_error(tmp_path: Path, questions: int, annotations: int) -> None:
    asked, answered = vqav2_entries(6)
    paths = (
        write(tmp_path / "q.json", {"questions": asked[:questions]}),
        write(tmp_path / "a.json", {"annotations": answered[:annotations]}),
    )
    with pytest.raises(ValueError, match=r"does not match .*take both files from one split and release"):
        read(source("vqav2", questions=paths[0], annotations=paths[1]))


def _vqav2(change: Any) -> Any:
    def spoil(folder: Path) -> QuestionSource:
        asked, answered = vqav2_entries(3)
        change(asked, answered)
        questions, annotations = write(folder / "q.json", {"questions": asked}), write(folder / "a.json", {"annotations": answered})
        return source("vqav2", questions=questions, annotations=annotations, image_name="{image_id}")

    return spoil


def _file(format: str, value: Any, **more: str) -> Any:
    return lambda folder: source(format, questions=write(folder / "f.json", value), **more)


SPOILED = {
    "twice": (_vqav2(lambda q, a: q.append(q[0])), "question_id 1000 is there twice"),
    "no id": (_vqav2(lambda q, a: q[1].pop("question_id")), "entry 1 has question_id = None"),
    "other image": (_vqav2(lambda q, a: a[1].update(image_id=7)), "question 1001 is about image 40, but its annotation about 7"),
    "no text": (_vqav2(lambda q, a: q[1].update(question=3)), 'question 1001 has "question" = 3: a text is expected'),
    "no answer": (_vqav2(lambda q, a: a[1].update(answers=["yes"])), "question 1001, an answer is a str, not an object"),
    "answers": (_vqav2(lambda q, a: a[1].update(answers="yes")), 'question 1001 has no list "answers"'),
    "types": (_file("gqa", {"1": {"imageId": "7", "types": ["query"]}}), "question 1: types is a list, not an object"),
    "no field": (
        _file("vqav2", {"questions": vqav2_entries(1)[0]}, image_name="{imageId}.jpg"),
        r"image_name = '\{imageId\}\.jpg' cannot be filled in .*its fields are data_subtype, image_id, question, question_id",
    ),
    "list": (_file("gqa", []), "is no object of questions by their id: format = 'gqa' does not fit it"),
    "image twice": (_file("vizwiz", [{"image": "a.jpg", "question": "?"}] * 2), "entry 1: a second question about a.jpg"),
    "two marks": (_file("llava", [{"image": "a", "conversations": talk("<image><image>", "b")}]), "has <image> 2 times and one image"),
    "no image": (_file("llava", [{"conversations": talk("<image> a", "b")}]), "has <image> 1 times and no image"),
    "no turns": (_file("llava", [{"conversations": []}]), "not by human and gpt in turn"),
    "human twice": (_file("llava", [{"conversations": [*talk("a"), *talk("b")]}]), r"turns by \['human', 'human'\]"),
    "no split": (_file("scienceqa", {"1": {"choices": ["a", "b"]}}), "split = None: scienceqa needs train, val or test"),
    "split": (_file("gqa", {}, split="val"), "split = 'val': scienceqa needs train, val or test, and no other format takes it"),
    "plain": (_file("gqa", {}, plain=True), "plain = true is for format = 'llava', whose replies can stand alone; gqa needs its questions"),
    "plain talk": (
        _file("llava", [{"image": "a", "conversations": talk("<image>", "b", "c", "d")}], plain=True),
        "entry 0: plain = true takes an image and its caption, this has 2 turns and 'a'",
    ),
    "letter": (_file("seed", {"questions": [files.seed_entry(answer="E")], "question_type": {}}), "answer = 'E' is none of A, B, C, D"),
    "annotations": (_file("gqa", {}, annotations="a.json"), "annotations = 'a.json' is for format = 'vqav2'"),
    "no questions": (lambda folder: source("gqa"), "questions is not set"),
    "no file": (lambda folder: source("gqa", questions=folder / "gone.json"), r"gone\.json: no such file"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_wrong_in_a_file_is_said(tmp_path: Path, what: str) -> None:
    spoil, message = SPOILED[what]
    with pytest.raises(ValueError, match=message):
        read(spoil(tmp_path))


def test_damaged_json_labels_and_answers_out_of_range_are_said(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"questions": [{"question_id"')
    with pytest.raises(ValueError, match=r"cut\.json is no JSON \(.*line 1"):
        read(source("vqav2", questions=tmp_path / "cut.json"))
    (tmp_path / "pope.json").write_text(json.dumps({"text": "?", "image": "a", "label": "maybe"}))
    with pytest.raises(ValueError, match=r"pope\.json: line 1: label = 'maybe' is neither yes nor no"):
        read(source("pope", questions=tmp_path / "pope.json"))
    problem = {"question": "?", "choices": ["a", "b"], "answer": 2, "hint": "", "image": None}
    write(tmp_path / "pid_splits.json", {"val": ["1"], "test": ["1", "9"]})
    for split, said in (("val", "answer = 2 is no index of its 2 choices"), ("test", r"lacks 1 problems of split 'test' \(9\)")):
        with pytest.raises(ValueError, match=said):
            read(source("scienceqa", questions=write(tmp_path / "problems.json", {"1": problem}), split=split))
    with pytest.raises(ValueError, match=re.escape('has no list "trian"')):
        read(source("scienceqa", questions=tmp_path / "problems.json", split="trian"))


def test_every_file_of_the_benchmarks_folder_is_a_format_of_the_recipe_and_the_reverse() -> None:
    modules = {path.stem for path in Path(benchmarks.__file__).parent.glob("*.py")} - {"__init__", "base"}
    formats = set(QuestionSource.model_fields["format"].annotation.__args__)  # type: ignore[union-attr]
    assert modules == formats - {"captions"} == set(BENCHMARKS)
    assert {name: benchmark(name).name for name in modules} == {name: name for name in modules}
    assert {type(benchmark(name)) for name in modules} == set(Benchmark.__subclasses__())
