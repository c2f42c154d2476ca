"""The files in which benchmarks publish questions, read strictly: one parser a format, and a hint when a file is another format's.

A parser yields `Question`s in the file's order. Errors are ValueErrors that name the file, the entry and the remedy; a file that
is half right is refused whole, since a score over the other half would look like a score.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megakd.recipe import QuestionSource
from megakd.vqa.json_files import (
    Entry,
    asked,
    by_id,
    is_id,
    items,
    object_of,
    part,
    people,
    read_lines,
    read_list,
    read_mapping,
    read_object,
    same_ids,
    shown,
    some,
    strings,
    text_of,
    text_or,
)

LETTERS = "ABCDEFGHIJ"
# Names of images as each benchmark publishes them.
IMAGE_NAMES = {
    "vqav2": "COCO_{data_subtype}_{image_id:012d}.jpg",
    "textvqa": "{image_id}.jpg",
    "vizwiz": "{image}",
    "gqa": "{imageId}.jpg",
    "scienceqa": "{split}/{question_id}/{image}",
    "pope": "{image}",
    "llava": "{image}",
}
_WIDEST = 250  # characters of a name


@dataclass(frozen=True, slots=True)
class Question:
    """A question as its benchmark asks it, before any prompt.

    question_id: the benchmark's own. image: file name or shard key, None where there is none. text: the question, empty for a caption.
    answers: all human answers in the file's order, () in a test set; answer: what is trained, the most frequent of them.
    family: what results are broken down by. meta: the entry's other fields.
    turns: (question, answer) of each turn of a conversation, () for a single question. short: a word or a phrase is asked for.
    """

    question_id: str | int
    image: str | None
    text: str
    answers: tuple[str, ...]
    answer: str
    family: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[tuple[str, str], ...] = ()
    short: bool = False

    @property
    def conversation(self) -> tuple[tuple[str, str], ...]:
        """The turns, of which a single question is one."""
        return self.turns or ((self.text, self.answer),)


@dataclass
class Reading:
    """How a file is read. said: what was left out or moved on the way, for people. fields: those of an entry that names an image."""

    source: QuestionSource
    said: list[str] = field(default_factory=list)
    fields: tuple[str, ...] = ()

    @property
    def pattern(self) -> str:
        """Of the images' names."""
        return self.source.image_name or IMAGE_NAMES[self.source.format]


def parse(source: QuestionSource, reading: Reading | None = None) -> Iterator[Question]:
    """The questions of every format but captions. Raises ValueError for a file that is missing or is not what `format` says."""
    assert source.format != "captions"
    if source.questions is None:
        raise ValueError(f"questions is not set: format = {source.format!r} reads the questions from a file")
    if source.annotations is not None and source.format != "vqav2":
        raise ValueError(
            f"annotations = {source.annotations!r} is for format = 'vqav2'; {source.format} has its answers beside its questions"
        )
    if (source.split is None) == (source.format == "scienceqa"):
        raise ValueError(f"split = {source.split!r}: scienceqa needs train, val or test, and no other format takes it")
    for key in ("questions", "annotations"):
        if "\0" in (getattr(source, key) or ""):
            raise ValueError(f"{key} = {getattr(source, key)!r}: a path has no NUL in it")
    reading = reading or Reading(source)
    _check_pattern(reading.pattern)
    return _PARSERS[source.format](reading, Path(source.questions))


def most_frequent(answers: Iterable[str]) -> str:
    """The answer given most often, the first of them where several are; "" of none."""
    counts = Counter(answers).most_common(1)
    return counts[0][0] if counts else ""


def _vqav2(reading: Reading, path: Path) -> Iterator[Question]:
    """VQAv2 and OK-VQA: questions and annotations joined by question_id. Without annotations: a test set.

    Family: the annotations' `question_type`. Images of COCO: COCO_{data_subtype}_{image_id:012d}.jpg, those of test-dev2015
    being test2015's. `multiple_choice_answer` is VQAv2's own most frequent answer; OK-VQA has none.
    Source: https://visualqa.org/download.html, https://okvqa.allenai.org/download.html
    """
    file = read_object(path, "vqav2", "questions")
    by_question = by_id(items(file, "questions", str(path)), path)
    answered: dict[Any, Entry] = {}
    if reading.source.annotations is not None:
        there = Path(reading.source.annotations)
        answered = by_id(items(read_object(there, "vqav2", "annotations"), "annotations", str(there)), there)
        same_ids(by_question, answered, path, there)
    subtype = text_or(file, "data_subtype", str(path)).replace("-dev", "")
    for question_id, entry in by_question.items():
        where = f"{path}: question {question_id}"
        known = answered.get(question_id, {})
        if known and known.get("image_id", entry.get("image_id")) != entry.get("image_id"):
            raise ValueError(
                f"{where} is about image {entry.get('image_id')}, but its annotation about {known['image_id']}: not one release"
            )
        answers = people(known, where)
        name = _image_name(reading, {**entry, "data_subtype": subtype}, where)
        meta = {key: value for key, value in {**entry, **known}.items() if key not in _KNOWN}
        answer = text_or(known, "multiple_choice_answer", where) or most_frequent(answers)
        family = text_or(known, "question_type", where)
        yield Question(question_id, name, asked(entry, "question", where), answers, answer, family, meta, short=True)


def _textvqa(reading: Reading, path: Path) -> Iterator[Question]:
    """TextVQA: {"data": [...]} with ten answers as plain strings. Source: https://textvqa.org/dataset"""
    entries = items(read_object(path, "textvqa", "data"), "data", str(path))
    for question_id, entry in by_id(entries, path).items():
        where = f"{path}: question {question_id}"
        answers = tuple(strings(entry, "answers", where))
        name = _image_name(reading, entry, where)
        meta = {key: entry[key] for key in ("set_name", "image_classes") if key in entry}
        yield Question(question_id, name, asked(entry, "question", where), answers, most_frequent(answers), "text", meta, short=True)


def _vizwiz(reading: Reading, path: Path) -> Iterator[Question]:
    """VizWiz: a list without question ids, one question an image, whose name is the id in submissions. Family: `answer_type`.

    Source: https://vizwiz.org/tasks-and-datasets/vqa/
    """
    seen: set[str] = set()
    for number, entry in enumerate(read_list(path, "vizwiz", "image", "question")):
        where = f"{path}: entry {number}"
        image = text_of(entry, "image", where)
        if image in seen:
            raise ValueError(f"{where}: a second question about {image}, whose name is the question's id")
        seen.add(image)
        answers = people(entry, where)
        meta = {key: entry[key] for key in ("answerable", "answer_type") if key in entry}
        name, family = _image_name(reading, entry, where), text_or(entry, "answer_type", where)
        yield Question(image, name, asked(entry, "question", where), answers, most_frequent(answers), family, meta, short=True)


def _gqa(reading: Reading, path: Path) -> Iterator[Question]:
    """GQA: {question id: {...}}, one answer. Family: `types.structural` (verify, query, choose, logical, compare).

    Source: https://cs.stanford.edu/people/dorarad/gqa/download.html
    """
    for question_id, entry in read_mapping(path, "gqa", "imageId").items():
        where = f"{path}: question {question_id}"
        answers = (text_of(entry, "answer", where),) if "answer" in entry else ()
        types, balanced = part(entry, "types", where), entry.get("isBalanced") is not False
        meta = {
            "types": types,
            "groups": part(entry, "groups", where),
            "isBalanced": balanced,
            "entailed": strings(entry, "entailed", where),
        }
        name = _image_name(reading, entry, where)
        family = text_or(types, "structural", where)
        yield Question(question_id, name, asked(entry, "question", where), answers, "".join(answers), family, meta, short=True)


def _scienceqa(reading: Reading, path: Path) -> Iterator[Question]:
    """ScienceQA: problems.json and pid_splits.json beside it; multiple choice, about half without an image. Family: `subject`.

    The prompt is context, question and lettered options in one line, as LLaVA's converter writes its "CQM" input, "N/A" where the
    problem has no hint and double spaces made single, then LLaVA-1.5's request for the letter alone; the answer is that letter. Lecture
    and solution are not shown: they are what models of chain-of-thought are trained on. Images lie in SPLIT/ID/image.png.
    Source: https://github.com/lupantech/ScienceQA, LLaVA scripts/convert_sqa_to_llava_base_prompt.py and model_vqa_science.py
    """
    problems = read_mapping(path, "scienceqa", "choices")
    there = path.with_name("pid_splits.json")
    pids = strings(read_object(there, "scienceqa", str(reading.source.split)), str(reading.source.split), str(there))
    if twice := [pid for pid, count in Counter(pids).items() if count > 1]:
        raise ValueError(f"{there}: split {reading.source.split!r} names {len(twice)} problems twice ({some(twice)}): once each")
    if unknown := [pid for pid in pids if pid not in problems]:
        raise ValueError(
            f"{path} lacks {len(unknown)} problems of split {reading.source.split!r} ({some(unknown)}): take both files from one release"
        )
    for pid in pids:
        entry, where = problems[pid], f"{path}: problem {pid}"
        choices = strings(entry, "choices", where)
        if not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"{where} has {len(choices)} choices: 2 to {len(LETTERS)} can be lettered")
        right = entry.get("answer")
        if right is not None and (type(right) is not int or not 0 <= right < len(choices)):
            raise ValueError(f"{where}: answer = {right!r} is no index of its {len(choices)} choices")
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        context = text_or(entry, "hint", where).strip() or "N/A"
        given = f"Context: {context}\nQuestion: {asked(entry, 'question', where)}\nOptions: {options}\n".replace("  ", " ").strip()
        text = f"{given}\nAnswer with the option's letter from the given choices directly."
        fields = {**entry, "question_id": pid, "split": entry.get("split", reading.source.split)}
        name = _image_name(reading, fields, where) if entry.get("image") else None
        answer = "" if right is None else LETTERS[right]
        meta = {key: entry[key] for key in ("subject", "grade", "topic", "choices") if key in entry} | {"has_hint": bool(entry.get("hint"))}
        yield Question(pid, name, text, (answer,) if answer else (), answer, text_or(entry, "subject", where), meta)


def _pope(reading: Reading, path: Path) -> Iterator[Question]:
    """POPE: a JSON object a line, label yes or no. One file is one way of drawing absent objects (random, popular, adversarial).

    Source: https://github.com/RUCAIBox/POPE
    """
    seen: set[Any] = set()
    for number, entry in enumerate(read_lines(path)):
        where = f"{path}: line {number + 1}"
        label = text_of(entry, "label", where).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: label = {label!r} is neither yes nor no")
        question_id = entry.get("question_id", number + 1)
        if not is_id(question_id) or question_id in seen:
            raise ValueError(f"{where}: question_id = {shown(question_id)}: a number or a text, and each once")
        seen.add(question_id)
        name = _image_name(reading, entry, where)
        yield Question(question_id, name, asked(entry, "text", where), (label,), label, "existence", {}, short=True)


def _llava(reading: Reading, path: Path) -> Iterator[Question]:
    """LLaVA's conversations: turns of "human" and "gpt" in turn; one image at most. Ids may repeat, as they do in LLaVA's own mix.

    "<image>" is taken out of the text: the image's tokens stand before the prompt, as LLaVA's training moves the mark to the front
    of its turn. A leading turn of "gpt" and turns without a reply are left out, the latter not where no turn has one.
    Source: LLaVA docs/Finetune_Custom_Data.md and llava/train/train.py (preprocess_multimodal, preprocess_v1)
    """
    moved = Counter[str]()
    for number, entry in enumerate(read_list(path, "llava", "conversations")):
        where = f"{path}: entry {number}"
        image = entry.get("image")
        turns, marks = _turns(entry, where, moved)
        if image is not None and not isinstance(image, str):
            raise ValueError(f"{where}: image = {shown(image)}: one image's name a conversation")
        if marks > (image is not None):
            raise ValueError(f"{where} has <image> {marks} times and {'one image' if image else 'no image'}: once, where there is one")
        question_id = number if entry.get("id") is None else entry["id"]
        if not is_id(question_id):
            raise ValueError(f"{where}: id = {shown(question_id)}: a number or a text")
        name = None if image is None else _image_name(reading, entry, where)
        text, answer = turns[0]
        answers = (answer,) if answer else ()
        yield Question(question_id, name, text, answers, answer, "", {}, tuple(turns))
    reading.said += [f"{count} {what}" for what, count in moved.items() if count]


def _turns(entry: Entry, where: str, moved: Counter[str]) -> tuple[list[tuple[str, str]], int]:
    """(human, gpt) of each turn, without "<image>", and how often that mark was there. moved: counts what does not stay as it was."""
    said = [
        (text_of(object_of(turn, where), "from", where), text_of(turn, "value", where)) for turn in items(entry, "conversations", where)
    ]
    if said and said[0][0] == "gpt":
        said = said[1:]
        moved["conversations begin with a turn of gpt, which is left out"] += 1
    if not said or [who for who, _ in said] != ["human" if place % 2 == 0 else "gpt" for place in range(len(said))]:
        raise ValueError(f"{where}: turns by {shown([who for who, _ in said])}, not by human and gpt in turn, the human first")
    marks = sum(text.count("<image>") for _, text in said)
    moved["conversations have <image> behind their first question: the image stands before it"] += marks > said[0][1].count("<image>")
    texts = [text.replace("<image>", "").strip() if "<image>" in text else text for _, text in said]
    turns = [(human, reply if reply.strip() else "") for human, reply in itertools.zip_longest(texts[::2], texts[1::2], fillvalue="")]
    kept = [turn for turn in turns if turn[1]] or turns[:1]
    moved["turns without a reply are left out"] += len(turns) - len(kept)
    if any(not human.strip() for human, _ in kept[1:]):  # the first may be empty: a caption, or text alone
        raise ValueError(f"{where} has a turn in which nothing is asked: take it out")
    return kept, marks


_PARSERS: dict[str, Callable[[Reading, Path], Iterator[Question]]] = {
    "vqav2": _vqav2,
    "textvqa": _textvqa,
    "vizwiz": _vizwiz,
    "gqa": _gqa,
    "scienceqa": _scienceqa,
    "pope": _pope,
    "llava": _llava,
}
_KNOWN = {"question", "question_id", "answers", "multiple_choice_answer"}


def _image_name(reading: Reading, entry: Entry, where: str) -> str:
    """The name that the pattern gives. A number or a text may stand in it, not true or false, which would be 1 and 0."""
    scalars = {key: value for key, value in entry.items() if is_id(value)}
    reading.fields = reading.fields or tuple(sorted(scalars))
    try:
        name = reading.pattern.format_map(scalars)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{where}: image_name = {reading.pattern!r} cannot be filled in ({error!r}); its fields are {', '.join(sorted(scalars))}"
        ) from error
    if "\0" in name:
        raise ValueError(f"{where}: its image's name {shown(name)} has a NUL in it")
    return name


def _check_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that is none, or that gives all questions one image."""
    try:
        parts = [(name, spec or "", kind) for _, name, spec, kind in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise ValueError(f"image_name = {pattern!r} is no pattern: {error}; write {{field}}, and {{{{ for a brace itself") from error
    if not parts:
        raise ValueError(f"image_name = {pattern!r} names no field, so that all questions would have one image; write one, as {{image_id}}")
    for name, spec, kind in parts:
        wide = any(int(digits) > _WIDEST for digits in re.findall(r"\d{1,20}", spec))
        if not name or not re.fullmatch(r"[^.\[\]{}!:]+", name) or kind or "{" in spec or wide:
            raise ValueError(f"image_name = {pattern!r}: {{{name}}} is to be a field's name alone, or with a width as {{image_id:012d}}")
