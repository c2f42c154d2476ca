"""Sets of questions with their images, by index.

1. `benchmarks` reads the benchmark's file: `Question`s.
2. `images` finds every image before anything starts: missing ones are an error here, not after an hour.
3. `QuestionSet`, or `CaptionSet` for image-text shards, gives question and image bytes by index; `Mixture` joins several.

Questions are kept as one block of JSON with offsets: as Python objects the 440,000 of VQAv2 and their 4.4 million answers take gigabytes in
every process, and a forked worker copies what it reads.
"""

from __future__ import annotations

import json
import logging
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megakd.data.bad_samples import BadSample, located
from megakd.data.caption_tokens import caption
from megakd.data.mixture import AnyOrder, MixtureOrder, Source
from megakd.data.sampler import Order
from megakd.data.shards import Sample, ShardSet
from megakd.data.storage import local_path
from megakd.recipe import Data, QuestionSource
from megakd.vqa.benchmarks import benchmark, parse
from megakd.vqa.benchmarks.base import Question, QuestionFile
from megakd.vqa.images import ImageBytes, ImageFolder, Images, ImageShards, MissingImages, is_shards
from megakd.vqa.json_files import some

# No blocks, which are for sequential reads of shards: questions jump between images anyway.
_BLOCK, _WINDOW = 1, 4096
_FIELDS = tuple(field.name for field in fields(Question))
log = logging.getLogger("megakd.vqa")
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode


class QuestionWithImage(NamedTuple):
    """A question, the bytes of its image (None: it has none, or none was requested), and where they come from."""

    question: Question
    image: bytes | None
    where: str


class Questions(Protocol):
    """Questions by index. `read` gives one result for each index, in order; a BadSample for one that cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Question: ...

    def read(self, indices: Sequence[int], images: bool) -> list[QuestionWithImage | BadSample]: ...

    @property
    def signature(self) -> int: ...


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Questions of one source. images None: text alone."""

    name: str
    packed: bytes | bytearray
    ends: NDArray[np.int64]  # (len,), the end of each question in `packed`
    images: Images | None

    @classmethod
    def of(cls, name: str, questions: Iterable[Question], images: Images | None) -> QuestionSet:
        """questions: packed one by one, so that an iterator's million are never there together as Python objects."""
        packed, ends = bytearray(), array("q")
        try:
            for question in questions:
                packed += _ENCODE([getattr(question, field) for field in _FIELDS]).encode()
                ends.append(len(packed))
        except RecursionError as error:
            raise ValueError("a question has a field that is nested too deeply: take it out") from error
        return cls(name, packed, np.array(ends, np.int64), images)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Question:
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        start = int(self.ends[index - 1]) if index else 0
        question_id, image, text, answers, answer, family, meta, turns, short = json.loads(self.packed[start : int(self.ends[index])])
        pairs = tuple((human, reply) for human, reply in turns)
        return Question(question_id, image, text, tuple(answers), answer, family, meta, pairs, short)

    def read(self, indices: Sequence[int], images: bool) -> list[QuestionWithImage | BadSample]:
        questions = [self[index] for index in indices]
        names = [question.image for question in questions if question.image is not None]
        bytes_of: Mapping[str, ImageBytes] = {}
        if images and self.images is not None:
            distinct = list(dict.fromkeys(names))
            bytes_of = dict(zip(distinct, self.images.read(distinct), strict=True))
        return [self._joined(question, bytes_of) for question in questions]

    def _joined(self, question: Question, bytes_of: Mapping[str, ImageBytes]) -> QuestionWithImage | BadSample:
        where = f"{self.name}: question {question.question_id}"
        image = None if question.image is None else bytes_of.get(question.image)
        if isinstance(image, BadSample):
            return BadSample(image.reason, image.detail, f"{where}: {image.where}")
        return QuestionWithImage(question, None, where) if image is None else QuestionWithImage(question, image[1], f"{where}: {image[0]}")

    @property
    def signature(self) -> int:
        """A checksum of the questions, without which a position means nothing."""
        return zlib.crc32(self.packed)


@dataclass(frozen=True, eq=False)
class CaptionSet:
    """Image-text shards as questions: an empty question, the caption as answer, the sample's index as id."""

    name: str
    shards: ShardSet

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Question:
        """Raises BadSample for a caption that cannot be read."""
        return self._question(index, self.shards.read(index, ("caption",)))

    def _question(self, index: int, sample: Sample) -> Question:
        with located(sample.where):
            text = caption(sample.members["caption"]).strip()
        return Question(index, sample.where, "", (text,), text, "caption")

    def read(self, indices: Sequence[int], images: bool) -> list[QuestionWithImage | BadSample]:
        results: list[QuestionWithImage | BadSample] = []
        samples = self.shards.read_each(list(indices), ("image", "caption") if images else ("caption",))
        for index, sample in zip(indices, samples, strict=True):
            try:
                if isinstance(sample, BadSample):
                    raise sample
                results.append(QuestionWithImage(self._question(index, sample), sample.members.get("image"), sample.where))
            except BadSample as bad:
                results.append(bad)
        return results

    @property
    def signature(self) -> int:
        return self.shards.signature


class Mixture:
    """Several sets one after the other, so that a shuffle of all mixes them in proportion to their sizes."""

    def __init__(self, sets: Mapping[str, Questions]) -> None:
        assert sets
        self.sets = dict(sets)
        self._parts = list(sets.values())
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Question:
        part, within = self._locate(index)
        return self._parts[part][within]

    def read(self, indices: Sequence[int], images: bool) -> list[QuestionWithImage | BadSample]:
        places = [self._locate(index) for index in indices]
        results: dict[int, QuestionWithImage | BadSample] = {}
        for part in sorted({part for part, _ in places}):  # one call a set, as remote shards are read many at a time
            slots = [slot for slot, place in enumerate(places) if place[0] == part]
            results.update(zip(slots, self._parts[part].read([places[slot][1] for slot in slots], images), strict=True))
        return [results[slot] for slot in range(len(indices))]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    @property
    def signature(self) -> int:
        return zlib.crc32(repr([(len(part), part.signature) for part in self._parts]).encode())


def open_questions(
    source: QuestionSource, key: str, data: Data, rank: int, world: int, barrier: Callable[[], None], *, to_learn: bool = False
) -> QuestionSet | CaptionSet:
    """The questions of one source, every image found. All ranks call it together.

    data: cache, max_pixels, caption and max_bad_fraction of shards. to_learn: questions need an answer; LLaVA's conversations without one
    are left out, with a warning. Raises ValueError that begins with `key`, the recipe's, for files that are missing, of another format, or
    do not match, and for missing images.
    """
    try:
        if source.format == "captions":
            return _open_captions(source, key, data, rank, world, barrier)
        questions, file = parse(source)
        reading = _Reading(to_learn)
        made = QuestionSet.of(key, reading.kept(questions), None)
        if not reading.seen:
            raise ValueError(f"questions = {source.questions!r} has not one question")
        for note in file.notes if rank == 0 else ():
            log.warning("%s: %s", key, note)
        reading.check(source, key if rank == 0 else None)
        return replace(made, images=_found_images(source, file, reading.images, data, rank, world, barrier))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


class _Reading:
    """What is to be known of a file's questions when all have passed: how many, their images' names, each once, and who has no answer."""

    def __init__(self, to_learn: bool) -> None:
        self.seen, self.images, self._to_learn = 0, dict[str, None](), to_learn
        self._lacking: list[str | int] = []

    def kept(self, questions: Iterable[Question]) -> Iterator[Question]:
        """Of those to learn, the ones with an answer."""
        for question in questions:
            self.seen += 1
            if self._to_learn and not question.answer.strip():
                self._lacking.append(question.question_id)
                continue
            if question.image is not None:
                self.images[question.image] = None
            yield question

    def check(self, source: QuestionSource, key: str | None) -> None:
        """Raises ValueError for questions without an answer where the format does not allow them. key: to warn with; None warns nobody."""
        if not self._lacking:
            return
        problem = f"{len(self._lacking)} of {self.seen} questions have no answer to learn ({some(self._lacking)})"
        of_format = benchmark(source.format)
        if not of_format.skips_unanswered or len(self._lacking) == self.seen:
            raise ValueError(f"{problem}: {of_format.without_answers(source)}")
        if key is not None:
            log.warning("%s: %s: they are left out", key, problem)


def _found_images(
    source: QuestionSource, file: QuestionFile, names: Iterable[str], data: Data, rank: int, world: int, barrier: Callable[[], None]
) -> Images | None:
    if source.images is None:
        return None
    try:
        if is_shards(source.images):
            return ImageShards(ShardSet.open_set(source.images, data, rank, world, barrier), names, source.images)
        return ImageFolder(Path(local_path(source.images)), names)
    except MissingImages as error:
        raise ValueError(
            f"{error}: complete it, or say by image_name how its files are named. Now it is {file.pattern!r}, with the entries' fields "
            f"{', '.join(file.fields) or 'none'}; there are {some(error.there)}{'' if is_shards(source.images) else ' in that folder'}; "
            f"keys of shards go without extension"
        ) from error


def open_mixture(
    sources: Mapping[str, QuestionSource], key: str, data: Data, rank: int, world: int, barrier: Callable[[], None]
) -> Mixture:
    """All sources to train on, by name. Raises as `open_questions`, and for questions without an answer."""
    return Mixture({name: open_questions(one, f"{key}.{name}", data, rank, world, barrier, to_learn=True) for name, one in sources.items()})


def question_order(questions: Questions, batch: int, seed: int, weights: Mapping[str, float | None] | None = None) -> AnyOrder:
    """The order of training. weights: of a Mixture's sets, by name; without any, one shuffle over all questions.

    Raises ValueError for fewer questions than a batch; with weights some are in it twice.
    """
    if weights is not None and any(weight is not None for weight in weights.values()):
        assert isinstance(questions, Mixture), "weights are of the sets of a mixture"
        sources = tuple(Source(name, len(part), float(weights[name] or 0)) for name, part in questions.sets.items())
        return MixtureOrder(sources, batch, seed, _BLOCK, _WINDOW)
    if len(questions) < batch:
        raise ValueError(f"answers.batch = {batch}, but answers.train has {len(questions)} questions: lower it, or add a source")
    return Order(len(questions), batch, seed, _BLOCK, _WINDOW)


def _open_captions(source: QuestionSource, key: str, data: Data, rank: int, world: int, barrier: Callable[[], None]) -> CaptionSet:
    for field in ("questions", "annotations", "image_name", "split", "plain"):
        if getattr(source, field):
            raise ValueError(
                f"{field} = {getattr(source, field)!r}: format = 'captions' reads the members of shards, images = '...*.tar' alone"
            )
    if source.images is None or not is_shards(source.images):
        raise ValueError(f"images = {source.images!r}: format = 'captions' needs image-text shards, as '/data/{{00000..00099}}.tar'")
    shards = ShardSet.open_set(source.images, data, rank, world, barrier)
    shards.known_bad.check(data.max_bad_fraction, at_least=1)
    return CaptionSet(key, shards)
