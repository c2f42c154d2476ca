"""Questions with short answers from a closed list, by family, and the answers of ten people who do not always agree.

A description leaves out what is asked, and in a relation question the places. Outside their own split no question names a held-out pair,
which in training could only be answered "no" or "0".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations, islice
from typing import NamedTuple

from megakd.data.shapes.captions import NUMBER_WORDS, SYNONYMS, Mention
from megakd.data.shapes.scene import CELLS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, Thing, names_held_out, related

QUESTIONS_PER_IMAGE = 3
PEOPLE = 10
# How many of the ten dissent: half of the questions are unanimous, and the true answer keeps six voices at least.
DISSENTERS, DISSENT_WEIGHTS = (0, 1, 2, 3, 4), (50, 20, 15, 10, 5)

ANSWERS = {
    "colour": COLOURS,
    "shape": SHAPES,
    "size": SIZES,
    "position": CELLS,
    "count": ("0", "1", "2", "3"),
    "existence": ("yes", "no"),
    "relation": ("yes", "no"),
}
ANSWER_TYPE = {"count": "number", "existence": "yes/no", "relation": "yes/no"}  # VQAv2's three types; the rest is "other"
FAMILIES = tuple(ANSWERS)


class ShapesQuestion(NamedTuple):
    family: str
    text: str
    answer: str


def questions(scene: Scene, rng: random.Random) -> list[ShapesQuestion]:
    """QUESTIONS_PER_IMAGE questions (fewer where the scene allows no more), each of another family."""
    chosen: list[ShapesQuestion] = []
    for family in rng.sample(FAMILIES, len(FAMILIES)):
        if len(chosen) == QUESTIONS_PER_IMAGE:
            break
        question = _ASK[family](scene, rng)
        if question is not None:
            chosen.append(question)
    return chosen


def annotation(question: ShapesQuestion, rng: random.Random) -> dict[str, object]:
    """The question's entry in a VQAv2 annotations file, without its ids."""
    return {
        "question_type": question.family,
        "answer_type": ANSWER_TYPE.get(question.family, "other"),
        "multiple_choice_answer": question.answer,
        "answers": ten_answers(question, rng),
    }


def ten_answers(question: ShapesQuestion, rng: random.Random) -> list[dict[str, object]]:
    """Ten answers with `answer_id` 1 to 10, the official metric's key; a dissenter words it differently or is wrong."""
    (dissenters,) = rng.choices(DISSENTERS, DISSENT_WEIGHTS)
    dissent = set(rng.sample(range(PEOPLE), dissenters))
    answers: list[dict[str, object]] = []
    for person in range(PEOPLE):
        answer, confidence = question.answer, "yes"
        if person in dissent:
            if rng.random() < 0.5:
                answer = rng.choice(_variants(question.answer))
            else:
                answer = rng.choice([other for other in ANSWERS[question.family] if other != question.answer])
                confidence = "maybe"
        answers.append({"answer": answer, "answer_confidence": confidence, "answer_id": person + 1})
    return answers


def _variants(answer: str) -> list[str]:
    """The answer as people type it: what the official normalisation undoes, and synonyms, which it does not."""
    if answer.isdigit():
        return [NUMBER_WORDS[int(answer)], f"{answer}."]
    if answer in ("yes", "no"):
        return [f"{answer}.", answer.capitalize()]
    synonym = " ".join(SYNONYMS.get(word, word) for word in answer.split(" "))
    return [f"{answer}.", answer.capitalize(), f"the {answer}"] + ([synonym] if synonym != answer else [])


def _describable(scene: Scene, rng: random.Random, *hide: str) -> Iterator[tuple[Thing, Mention]]:
    """The things that can be told from the others without the hidden attributes, in random order, each with a mention that does."""
    shown = [attribute for attribute in Mention._fields if attribute not in hide]
    subsets = [chosen for number in range(len(shown) + 1) for chosen in combinations(shown, number)]
    for thing in rng.sample(scene, len(scene)):
        mentions = [Mention(**{attribute: getattr(thing, attribute) for attribute in chosen}) for chosen in subsets]
        others = [other for other in scene if other is not thing]
        if unique := [mention for mention in mentions if not any(map(mention.fits, others))]:
            yield thing, rng.choice(unique)


def _ask_attribute(attribute: str, asks: str) -> Callable[[Scene, random.Random], ShapesQuestion | None]:
    def ask(scene: Scene, rng: random.Random) -> ShapesQuestion | None:
        for thing, mention in _describable(scene, rng, attribute):
            answer = CELLS[thing.cell] if attribute == "cell" else str(getattr(thing, attribute))
            return ShapesQuestion("position" if attribute == "cell" else attribute, f"{asks} is {mention.words('the')}?", answer)
        return None

    return ask


def _ask_count(scene: Scene, rng: random.Random) -> ShapesQuestion | None:
    mentions = [Mention(), *(Mention(shape=s) for s in SHAPES), *(Mention(colour=c) for c in COLOURS)]
    by_count: dict[int, list[Mention]] = {}
    for mention in mentions:
        by_count.setdefault(sum(map(mention.fits, scene)), []).append(mention)
    # the answer is drawn first, as most questions would be answered "0"
    number = rng.choice(sorted(by_count))
    return ShapesQuestion("count", f"how many {rng.choice(by_count[number]).words(plural=True)} are there?", str(number))


def _ask_existence(scene: Scene, rng: random.Random) -> ShapesQuestion | None:
    """ "no" is asked about a near miss: a thing of the scene with one attribute changed."""
    thing = rng.choice(scene)
    attributes = rng.choice((("shape",), ("colour",), ("shape", "colour"), ("shape", "colour"), ("shape", "size")))
    mention = Mention(**{attribute: getattr(thing, attribute) for attribute in attributes})
    if rng.random() < 0.5:
        return ShapesQuestion("existence", f"is there {mention.words('a')}?", "yes")
    misses = [
        missed
        for attribute in attributes
        for value in ANSWERS[attribute]
        if not any(map((missed := mention.saying(attribute, value)).fits, scene)) and not names_held_out(missed.shape, missed.colour)
    ]
    return ShapesQuestion("existence", f"is there {rng.choice(misses).words('a')}?", "no") if misses else None


def ask_relation(scene: Scene, rng: random.Random) -> ShapesQuestion | None:
    """Whether one thing is left of, right of, above or below another; None where no two can be told apart without their places."""
    described = list(islice(_describable(scene, rng, "cell"), 2))
    if len(described) < 2:
        return None
    (one, one_words), (other, other_words) = described
    answer = rng.choice(("yes", "no"))
    # two things in one row or column are in one relation of the four, others in two: "no" can always be asked
    relation = rng.choice([r for r in RELATIONS if related(r, one, other) == (answer == "yes")])
    return ShapesQuestion("relation", f"is {one_words.words('the')} {relation} {other_words.words('the')}?", answer)


_ASK: dict[str, Callable[[Scene, random.Random], ShapesQuestion | None]] = {
    "colour": _ask_attribute("colour", "what colour"),
    "shape": _ask_attribute("shape", "what shape"),
    "size": _ask_attribute("size", "what size"),
    "position": _ask_attribute("cell", "where"),
    "count": _ask_count,
    "existence": _ask_existence,
    "relation": ask_relation,
}
