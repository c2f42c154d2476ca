"""Captions are true, negatives false and answers right, by an oracle that reads the texts and the `.json` scene graph alone."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from megakd.data.shapes import captions as told
from megakd.data.shapes import questions as asked
from megakd.data.shapes.scene import draw_scene, scene_graph

SHAPES = {"circle", "square", "triangle", "star", "cross", "diamond"}
COLOURS = {"red", "green", "blue", "yellow", "purple", "cyan", "white"}
SIZES = {"small", "large"}
HELD_OUT = {("circle", "red"), ("circle", "white"), ("square", "cyan"), ("triangle", "purple"), ("star", "yellow"), ("cross", "blue")} | {
    ("diamond", "green")
}
PLAIN = {"little": "small", "big": "large", "crimson": "red", "lime": "green", "cobalt": "blue", "golden": "yellow", "violet": "purple"} | {
    "turquoise": "cyan", "snowy": "white", "disc": "circle", "box": "square", "plus": "cross", "rhombus": "diamond",
    "upper": "top", "lower": "bottom",
}  # fmt: skip
NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3}
RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    " left of ": lambda a, b: a["column"] < b["column"],
    " right of ": lambda a, b: a["column"] > b["column"],
    " above ": lambda a, b: a["row"] < b["row"],
    " below ": lambda a, b: a["row"] > b["row"],
}
Graph = dict[str, Any]


def conditions(phrase: str) -> dict[str, str]:
    """What "a small red circle at the top left" asks of a thing."""
    phrase, _, place = phrase.partition(" at the ")
    wanted = {"position": place} if place else {}
    for word in phrase.split():
        word = word if word in SHAPES else word.removesuffix("es") if word == "crosses" else word.removesuffix("s")
        for attribute, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
            if word in values:
                wanted[attribute] = word
                break
        else:
            assert word in {"a", "the", "thing", "one", "two", "three"}, f"not a word of the world: {word}"
    return wanted


def fitting(phrase: str, graph: Graph) -> list[dict[str, Any]]:
    return [thing for thing in graph["things"] if all(thing[key] == value for key, value in conditions(phrase).items())]


def true(text: str, graph: Graph) -> bool:
    text = " ".join(PLAIN.get(word, word) for word in text.split())
    for words, relation in RELATIONS.items():
        if words in text:
            one, other = (fitting(side, graph) for side in text.split(words))
            return any(relation(a, b) for a in one for b in other)
    parts = text.removeprefix("only ").split(" and ")
    if parts[0].split()[0] in NUMBERS:
        return all(len(fitting(part, graph)) == NUMBERS[part.split()[0]] for part in parts)
    if text.startswith("only ") and len(parts) != len(graph["things"]):
        return False
    places = [[graph["things"].index(thing) for thing in fitting(part, graph)] for part in parts]
    return any(len(set(chosen)) == len(parts) for chosen in itertools.product(*places))


def answer(question: str, graph: Graph) -> str:
    text = question.removesuffix("?")
    if text.startswith("how many "):
        return str(len(fitting(text.removeprefix("how many ").removesuffix(" are there"), graph)))
    if text.startswith("is there "):
        return "yes" if fitting(text.removeprefix("is there "), graph) else "no"
    for words, relation in RELATIONS.items():
        if words in text:
            one, other = (only(fitting(side, graph)) for side in text.removeprefix("is ").split(words))
            return "yes" if relation(one, other) else "no"
    asks, _, phrase = text.partition(" is ")
    attribute = "position" if asks == "where" else asks.removeprefix("what ")
    assert attribute not in conditions(phrase), f"the question tells its answer: {question}"
    return str(only(fitting(phrase, graph))[attribute])


def only(things: list[dict[str, Any]]) -> dict[str, Any]:
    assert len(things) == 1, "the description does not single out one thing"
    return things[0]


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    rng = random.Random(5)
    return [draw_scene(rng) for _ in range(2500)]


def test_the_oracle_knows_true_from_false() -> None:
    circle = {"shape": "circle", "colour": "green", "size": "small", "row": 0, "column": 0, "position": "top left"}
    star = {"shape": "star", "colour": "blue", "size": "large", "row": 1, "column": 1, "position": "center"}
    graph = {"things": [circle, star]}
    for text in ("a green thing", "only a big cobalt star and a disc", "a circle above a star", "one star and one circle", "two things"):
        assert true(text, graph), text
    for text in ("a blue circle", "only a circle", "a star left of a circle", "two stars", "a star and a star", "a star at the top left"):
        assert not true(text, graph), text


def test_every_caption_of_every_kind_is_true_of_its_scene(scenes: list[Any]) -> None:
    kinds: Counter[str] = Counter()
    for number, scene in enumerate(scenes):
        for kind, caption in told.captions(scene, random.Random(number)).items():
            assert true(caption.text, scene_graph(scene)), (kind, caption.text, scene)
            kinds[kind] += 1
    assert set(kinds) == set(told.CAPTION_KINDS)
    assert kinds["relational"] == sum(len(scene) > 1 for scene in scenes)


def test_every_negative_is_false_in_the_wording_of_its_caption(scenes: list[Any]) -> None:
    kinds: Counter[tuple[str, str]] = Counter()
    for number, scene in enumerate(scenes):
        rng = random.Random(number)
        for kind, caption in told.captions(scene, rng).items():
            for negative, text in told.negatives(caption, scene, rng).items():
                assert not true(text, scene_graph(scene)), (negative, caption.text, text)
                assert text.startswith("only ") == caption.text.startswith("only ")
                kinds[kind, negative] += 1
    assert {negative for _, negative in kinds} == set(told.NEGATIVE_KINDS)
    # The retrieval set's captions are full ones: each kind must be frequent enough there to be a measure.
    assert all(kinds["full", negative] > 0.5 * len(scenes) for negative in told.NEGATIVE_KINDS), kinds


def test_swaps_keep_the_bag_of_words(scenes: list[Any]) -> None:
    for number, scene in enumerate(scenes[:500]):
        rng = random.Random(number)
        caption = told.captions(scene, rng)["full"]
        false = told.negatives(caption, scene, rng)
        for kind in {"attribute_swap", "relation"} & set(false):
            assert sorted(false[kind].split()) == sorted(caption.text.split())
            assert false[kind] != caption.text


def test_no_text_names_a_held_out_pair(scenes: list[Any]) -> None:
    for number, scene in enumerate(scenes[:1000]):
        rng = random.Random(number)
        said = told.captions(scene, rng)
        texts = [text for caption in said.values() for text in (caption.text, *told.negatives(caption, scene, rng).values())]
        texts += [question.text.removesuffix("?") for question in asked.questions(scene, rng)]
        for text in texts:
            words = [PLAIN.get(word, word) for word in text.split()]
            pairs = {(noun, colour) for colour, noun in itertools.pairwise(words)}
            assert not pairs & HELD_OUT, text


def test_every_answer_is_right_and_no_question_tells_it(scenes: list[Any]) -> None:
    for number, scene in enumerate(scenes):
        questions = asked.questions(scene, random.Random(number))
        assert len({question.family for question in questions}) == len(questions) == asked.QUESTIONS_PER_IMAGE
        for question in questions:
            assert answer(question.text, scene_graph(scene)) == question.answer, (question, scene)
            assert question.answer in asked.ANSWERS[question.family]
            if question.family == "relation":
                assert " at the " not in question.text


@pytest.mark.parametrize(
    ("family", "bound"),
    [("colour", 0.25), ("shape", 0.25), ("size", 0.58), ("position", 0.2), ("count", 0.45), ("existence", 0.56), ("relation", 0.56)],
)
def test_no_answer_is_the_answer_to_most_questions_of_its_family(scenes: list[Any], family: str, bound: float) -> None:
    drawn = (question for number, scene in enumerate(scenes) for question in asked.questions(scene, random.Random(number)))
    answers = Counter(question.answer for question in drawn if question.family == family)
    assert answers.total() > 500
    assert set(answers) == set(asked.ANSWERS[family])
    assert max(answers.values()) / answers.total() < bound, answers


def test_yes_and_no_cannot_be_told_from_the_relation_word(scenes: list[Any]) -> None:
    drawn = [question for number, scene in enumerate(scenes) for question in asked.questions(scene, random.Random(number))]
    for words in RELATIONS:
        yes = [question.answer == "yes" for question in drawn if question.family == "relation" and words in question.text]
        assert 0.38 < sum(yes) / len(yes) < 0.62


def test_ten_people_answer_with_distinct_ids_and_the_truth_keeps_the_majority(scenes: list[Any]) -> None:
    unanimous, annotations = 0, []
    for number, scene in enumerate(scenes[:600]):
        rng = random.Random(number)
        annotations += [asked.annotation(question, rng) for question in asked.questions(scene, rng)]
    for annotation in annotations:
        answers: Any = annotation["answers"]
        assert [entry["answer_id"] for entry in answers] == list(range(1, 11))
        votes = Counter(entry["answer"] for entry in answers)
        assert votes.most_common(1)[0][0] == annotation["multiple_choice_answer"]
        assert votes[str(annotation["multiple_choice_answer"])] >= 6
        assert annotation["answer_type"] in {"yes/no", "number", "other"}
        unanimous += len(votes) == 1
        json.dumps(annotation)
    assert 0.4 < unanimous / len(annotations) < 0.6
