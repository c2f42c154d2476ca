"""Questions of a run's evaluation, with picture, answer and truth."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.data.bad_samples import BadSample
from megakd.data.transforms import rgb_image
from megakd.pages.page import BAD, GOOD, LOOK, Card, Cards, Line, Picture
from megakd.pages.run.pictures import short, small_jpeg, spread
from megakd.pages.run.reading import RunFiles
from megakd.recipe import Data, QuestionSource, Recipe
from megakd.vqa.answers_log import AnswersLog, GivenAnswer, read_written
from megakd.vqa.benchmarks import benchmark
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.evaluate import ANSWERS
from megakd.vqa.sets import QuestionSet, open_questions

EVENLY, WRONG = 12, 6
RIGHT = 0.5  # a score from which an answer is called right; VQA accuracy of 0.3 and 0.6 are between
MOST_SETS = 3
MOST_TRUTHS = 3  # different answers of people that are shown


@dataclass(frozen=True)
class _Example:
    index: int
    answer: str
    score: float | None
    unusable: str | None


def examples(run: RunFiles) -> tuple[list[Cards], list[str]]:
    """(examples of each set, what could not be shown and why)."""
    recipe, found, said = run.recipe, [], []
    if isinstance(recipe, str):
        return [], ["Questions are not shown, as the recipe cannot be read."] if run.settings.get("answers") else []
    sets = list(recipe.evaluation.vqa.items())
    if len(sets) > MOST_SETS:
        said.append(f"Questions are of the first {MOST_SETS} of {len(sets)} sets.")
    for place, (name, source) in enumerate(sets[:MOST_SETS]):
        try:
            cards, notes = _of_set(run, recipe, name, source, place)
        except (ValueError, OSError) as error:
            said.append(f"Questions of {name} are not shown: {short(str(error))} Paths are seen from the folder where this page was made.")
            continue
        found += cards
        said += notes
    return found, said


def _of_set(run: RunFiles, recipe: Recipe, name: str, source: QuestionSource, place: int) -> tuple[list[Cards], list[str]]:
    written = read_written(AnswersLog.path_of(run.folder / ANSWERS, name))
    if written is None:
        return [], [f"Questions of {name} have no answers yet."]
    questions, notes = _questions(source, f"evaluation.vqa.{name}", recipe.data)
    known, odd = _matched(written, questions, source)
    if odd:
        notes.append(f"{odd} of {len(written)} answers to {name} are to other questions than its file has now: it was changed.")
    even = spread(known, EVENLY)
    wrong = [one for one in known if one.score is not None and one.score < RIGHT and one not in even]
    captions = (
        ("even", f"Questions of {name}", f"{len(even)} of {len(known)}, evenly spaced over the set.", even),
        ("wrong", f"Wrong answers to questions of {name}", "More that are wrong, evenly spaced over these.", spread(wrong, WRONG)),
    )
    cards = [
        Cards(
            f"questions_{place}_{kind}",
            title,
            caption,
            tuple(_card(one, questions, f"question_{place}_{one.index}", recipe.data) for one in of),
        )
        for kind, title, caption, of in captions
        if of
    ]
    return cards, notes


def _questions(source: QuestionSource, key: str, data: Data) -> tuple[QuestionSet, list[str]]:
    """Without pictures where these are gone. Raises ValueError where the questions are."""
    try:
        opened, notes = _opened(source, key, data), []
    except ValueError as error:
        if source.images is None:
            raise
        opened, notes = _opened(source.model_copy(update={"images": None}), key, data), [f"Pictures are not shown: {short(str(error))}"]
    return opened, notes


def _opened(source: QuestionSource, key: str, data: Data) -> QuestionSet:
    opened = open_questions(source, key, data, 0, 1, lambda: None)
    if not isinstance(opened, QuestionSet):
        raise ValueError(f"{key}: captions are no questions.")
    return opened


def _matched(
    written: list[tuple[int, str | int, GivenAnswer]], questions: QuestionSet, source: QuestionSource
) -> tuple[list[_Example], int]:
    """The answers with their scores, in the set's order, and how many are to questions that are not there."""
    found, of_format = [], benchmark(source.format)
    for index, question_id, given in written:
        question = questions[index] if 0 <= index < len(questions) else None
        if question is None or question.question_id != question_id:
            continue
        score = None
        if question.answers:
            score = of_format.score(question, given.answer) if given.unusable is None else 0.0
        found.append(_Example(index, given.answer, score, given.unusable))
    return found, len(written) - len(found)


def _card(example: _Example, questions: QuestionSet, key: str, data: Data) -> Card:
    question = questions[example.index]
    lines = [Line("question", short(question.text) or "–")]
    if example.unusable is not None:
        lines.append(Line("answer", f"not asked: {short(example.unusable)}", BAD))
    else:
        partly = f" (score {example.score:.1f})" if example.score is not None and 0 < example.score < 1 else ""
        lines.append(Line("answer", (short(example.answer) or "nothing") + partly, _mark(example.score)))
    lines.append(Line("truth", _truth(question)))
    return Card(_picture(questions, example.index, question, key, data), tuple(lines))


def _mark(score: float | None) -> str:
    if score is None:
        return ""
    return GOOD if score >= RIGHT else LOOK if score > 0 else BAD


def _truth(question: Question) -> str:
    """The most frequent answer, then others of people."""
    different = dict.fromkeys(filter(None, (question.answer, *question.answers)))
    return ", ".join(map(short, list(different)[:MOST_TRUTHS])) or "not known"


def _picture(questions: QuestionSet, index: int, question: Question, key: str, data: Data) -> Picture | None:
    (item,) = questions.read([index], True)
    if isinstance(item, BadSample) or item.image is None:
        return None
    try:
        return Picture(key, small_jpeg(rgb_image(item.image, data)), f"the picture of: {short(question.text)}")
    except BadSample:
        return None
