"""The closed-vocabulary question reader: what a small network, trained on the spot, reads from a frozen tower's patch tokens.

It stands beside VQA through a decoder (`vqa/evaluate.py`), costs a minute where that costs an hour, and is another measure: the reader
knows no language, and chooses among the most frequent answers of its training questions.

1. The patch tokens of every image, once (`patch_features.py`).
2. Rank 0 trains a reader (`reader_training.py`). All draws come of `seed`: neither ranks nor the rest of the run changes them.
3. Its answers to the test questions are scored by the benchmark's own rules, beside the training questions' most frequent answers and,
   where the recipe asks for it, a reader that sees no image.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megakd.data.bad_samples import BadCounter, BadSample
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.patch_features import features, plan_tokens
from megakd.evaluation.reader_training import Lessons, Seen, Training, one_thread, standardise
from megakd.recipe import Data, Recipe
from megakd.recipe.evaluation import Reader
from megakd.recipe.schema import Scored
from megakd.runtime import collectives, watchdog
from megakd.runtime.console import with_progress
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.vqa.benchmarks import benchmark
from megakd.vqa.benchmarks.base import Answered
from megakd.vqa.evaluate import Opened, try_images
from megakd.vqa.images import Images
from megakd.vqa.sets import QuestionSet, open_questions

_CHECKED = 50  # steps between two looks at signals, with all ranks together
_NONE, _LOST = -1, -2  # in the place of an image's number: the question has none; it cannot be read


@dataclass(frozen=True)
class ReaderSet:
    """What a reader learns from and is scored on, opened. data: how images are read, and how many may be unusable."""

    settings: Reader
    data: Data
    train: Opened
    test: Opened

    @property
    def pictures(self) -> NamedPictures:
        """The images of both, each once."""
        return NamedPictures.of([self.train.questions, self.test.questions])


def open_readers(recipe: Recipe | Scored, world: World) -> dict[str, ReaderSet]:
    """Every set under evaluation.reader, its questions read and images found. A collective.

    Raises ValueError, on every rank and naming the key, for sets that are missing or damaged, and for questions that no reader can learn.
    """
    sets: dict[str, ReaderSet] = {}
    for name, settings in recipe.evaluation.reader.items():
        key = f"evaluation.reader.{name}"
        parts = {part: _open(settings, part, f"{key}.{part}", recipe.data, world) for part in ("train", "test")}
        learned = parts["train"].questions
        answers = {learned[index].answer for index in range(len(learned))}
        if len(answers) < 2:
            raise ValueError(f"{key}.train: all {len(learned)} questions have one answer, {answers.pop()!r}: there is nothing to choose")
        if len(learned) < settings.batch:
            raise ValueError(f"{key}.batch = {settings.batch}, but its train has {len(learned)} questions: lower it to that at most")
        asked = parts["test"].questions
        if not any(asked[index].answers for index in range(len(asked))):
            raise ValueError(f"{key}.test: no question has an answer to be scored by: name its annotations, or take a split that has them")
        sets[name] = ReaderSet(settings, recipe.data, **parts)
    return sets


def _open(settings: Reader, part: str, key: str, data: Data, world: World) -> Opened:
    source = settings.train if part == "train" else settings.test
    if source.format in ("captions", "llava"):
        raise ValueError(
            f"{key}.format = {source.format!r}: a reader chooses among short answers to single questions; give a benchmark's questions, as "
            f"format = 'vqav2'"
        )
    if source.images is None:
        raise ValueError(f"{key}.images: missing; what a reader is for is what the tower shows of images: a folder, or shards (*.tar)")
    questions = open_questions(source, key, data, world.rank, world.size, lambda: collectives.barrier(world), to_learn=part == "train")
    assert isinstance(questions, QuestionSet)
    collectives.by_main(lambda: try_images(questions, key, data), world)
    return Opened(source, questions)


def check_tower(sets: dict[str, ReaderSet], visual: nn.Module) -> list[str]:
    """A line for each set: its size. Raises ValueError for a tower, perhaps on torch's meta device, whose tokens are not as asked for."""
    lines = []
    for name, one in sets.items():
        key, images = f"evaluation.reader.{name}", len(one.pictures)
        tokens, channels = plan_tokens(visual, one.settings.layer, one.settings.image_tokens, images, key).shape
        size = 2 * images * tokens * channels / 2**20
        lines.append(
            f"question reader {name}, at the end: {len(one.train.questions)} questions to learn, {len(one.test.questions)} to be "
            f"scored on; {tokens} tokens of {channels} numbers for each of {images} images, {size:.0f} MiB"
        )
    return lines


@dataclass(frozen=True)
class NamedPictures:
    """The images of several question sets, by number. places: of each set's images by name, their numbers."""

    names: list[tuple[Images, str]]
    places: list[dict[str, int]]

    @classmethod
    def of(cls, sets: Sequence[QuestionSet]) -> NamedPictures:
        names, places = list[tuple[Images, str]](), []
        for questions in sets:
            assert questions.images is not None
            asked = dict.fromkeys(name for index in range(len(questions)) if (name := questions[index].image) is not None)
            places.append({name: len(names) + number for number, name in enumerate(asked)})
            names += [(questions.images, name) for name in asked]
        return cls(names, places)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[str, bytes] | BadSample]:
        for index in indices:
            images, name = self.names[index]
            yield from images.read([name])


def score_readers(sets: dict[str, ReaderSet], encoder: Encoder, world: World, interruptions: StopPoller) -> dict[str, dict[str, Any]]:
    """{set: {"accuracy", "questions", "by_family", "majority", "answers", ...}}, the same on every rank; a collective.

    Raises ValueError, on every rank, when more than data.max_bad_fraction of a set's questions lack their image, and as `features`;
    Interrupted when a signal comes.
    """
    return {name: _score(one, f"evaluation.reader.{name}", encoder, world, interruptions) for name, one in sets.items()}


def _score(one: ReaderSet, key: str, encoder: Encoder, world: World, interruptions: StopPoller) -> dict[str, Any]:
    settings, pictures = one.settings, one.pictures
    visual: Any = encoder.clip.visual
    plan = plan_tokens(visual, settings.layer, settings.image_tokens, len(pictures), key)
    found = features(pictures, plan, encoder, world, one.data, interruptions, key)
    numbers = []
    for part, opened, places in zip(("train", "test"), (one.train, one.test), pictures.places, strict=True):
        of_part, bad = _image_numbers(opened.questions, places, found.unread)
        bad.check(one.data.max_bad_fraction, at_least=1, what="questions", key=f"{key}.{part}")
        numbers.append(of_part)
    learned, asked = numbers

    lessons, seen = Lessons.nothing(), Seen(found.tokens_NPC)
    if world.is_main:
        usable = [(index, number) for index, number in enumerate(learned) if number != _LOST]
        lessons = Lessons.of(one.train.questions, benchmark(one.train.source.format), usable, settings.answers)
        standardise(found.tokens_NPC, sorted({number for _, number in usable if number >= 0}))
    given = {}
    for kind in ("seeing", "blind") if settings.blind else ("seeing",):
        training = Training(settings, lessons, seen if kind == "seeing" else None, world.device) if world.is_main else None
        with one_thread(world.device):
            for step in with_progress(range(settings.steps), f"evaluating {key} (the {kind} reader learns)", "steps"):
                if step % _CHECKED == 0:
                    interruptions.check()
                    watchdog.beat("evaluating")
                if training is not None:
                    training.step(step)
        given[kind] = collectives.by_main(lambda training=training: _answers(training, one.test.questions, asked, key), world)  # type: ignore[misc, union-attr]
    return collectives.by_main(lambda: _results(one, lessons, given, asked, plan.shape[0]), world)


def _image_numbers(questions: QuestionSet, places: dict[str, int], unread: dict[int, BadSample]) -> tuple[list[int], BadCounter]:
    """The number of each question's image, _NONE or _LOST, and the questions that are lost."""
    numbers, bad = [], BadCounter(seen=len(questions))
    for index in range(len(questions)):
        name = questions[index].image
        number = _NONE if name is None else places[name]
        if number in unread:
            bad.add(unread[number].reason, str(unread[number]))
        numbers.append(_LOST if number in unread else number)
    return numbers, bad


def _answers(training: Training, questions: QuestionSet, asked: list[int], key: str) -> dict[int, str]:
    """Index -> answer of the test questions that can be asked. Raises ValueError when the training has diverged."""
    if not training.is_finite():
        raise ValueError(f"{key}.lr = {training.settings.lr:g}: the reader's training has diverged; lower it")
    askable = [index for index, number in enumerate(asked) if number != _LOST]
    answers = training.answer([questions[index].text for index in askable], [asked[index] for index in askable])
    return dict(zip(askable, answers, strict=True))


def _results(one: ReaderSet, lessons: Lessons, given: dict[str, dict[int, str]], asked: list[int], tokens: int) -> dict[str, Any]:
    questions, of_format = one.test.questions, benchmark(one.test.source.format)

    def scored(answers: dict[int, str]) -> dict[str, Any]:
        return of_format.results([Answered(questions[index], answers.get(index, ""), index in answers) for index in range(len(questions))])

    results = {"format": of_format.name, **scored(given["seeing"])}
    results["majority"] = scored(_most_frequent(one, list(given["seeing"])))["accuracy"]
    if "blind" in given:
        results["blind"] = scored(given["blind"])["accuracy"]
    learned = len(lessons.image_Q)
    return results | {
        "answers": len(lessons.answers),
        "learned": learned,
        "left_out": len(one.train.questions) - learned,
        "unusable": len(asked) - len(given["seeing"]),
        "image_tokens": tokens,
    }


def _most_frequent(one: ReaderSet, askable: list[int]) -> dict[int, str]:
    """To each test question the most frequent answer of the training questions with its text; else of its family's; else of all."""
    learned, asked = one.train.questions, one.test.questions
    counted: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for index in range(len(learned)):
        question = learned[index]
        for group in (("text", question.text), ("family", question.family), ("all", "")):
            counted[group][question.answer] += 1
    best = {group: min(answers, key=lambda answer, answers=answers: (-answers[answer], answer)) for group, answers in counted.items()}  # type: ignore[misc]
    groups = ((index, ("text", asked[index].text), ("family", asked[index].family)) for index in askable)
    return {index: best.get(text) or best.get(family) or best["all", ""] for index, text, family in groups}
