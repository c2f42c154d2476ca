"""The files in which benchmarks publish questions, read strictly: one parser a format, and a hint when a file is another format's.

A parser yields `Question`s in the file's order. Errors are ValueErrors that name the file, the entry and the remedy; a file that
is half right is refused whole, since a score over the other half would look like a score.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megakd.data.question_entries import (
    Entry,
    by_id,
    items,
    object_of,
    part,
    people,
    read_lines,
    read_list,
    read_mapping,
    read_object,
    same_ids,
    some,
    strings,
    text_of,
)
from megakd.recipe import QuestionSource

LETTERS = "ABCDEFGHIJ"


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


def parse(source: QuestionSource) -> Iterator[Question]:
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
    return _PARSERS[source.format](source, Path(source.questions))


def most_frequent(answers: Iterable[str]) -> str:
    """The answer given most often, the first of them where several are; "" of none."""
    counts = Counter(answers).most_common(1)
    return counts[0][0] if counts else ""


def _vqav2(source: QuestionSource, path: Path) -> Iterator[Question]:
    """VQAv2 and OK-VQA: questions and annotations joined by question_id. Without annotations: a test set.

    Family: the annotations' `question_type`. Images of COCO: COCO_{data_subtype}_{image_id:012d}.jpg, those of test-dev2015
    being test2015's. `multiple_choice_answer` is VQAv2's own most frequent answer; OK-VQA has none.
    Source: https://visualqa.org/download.html, https://okvqa.allenai.org/download.html
    """
    file = read_object(path, "vqav2", "questions")
    asked = by_id(items(file, "questions", str(path)), path)
    answered: dict[Any, Entry] = {}
    if source.annotations is not None:
        there = Path(source.annotations)
        answered = by_id(items(read_object(there, "vqav2", "annotations"), "annotations", str(there)), there)
        same_ids(asked, answered, path, there)
    subtype = str(file.get("data_subtype", "")).replace("-dev", "")
    for question_id, entry in asked.items():
        where = f"{path}: question {question_id}"
        known = answered.get(question_id, {})
        if known and known.get("image_id", entry.get("image_id")) != entry.get("image_id"):
            raise ValueError(
                f"{where} is about image {entry.get('image_id')}, but its annotation about {known['image_id']}: not one release"
            )
        answers = people(known, where)
        name = _image_name(source, "COCO_{data_subtype}_{image_id:012d}.jpg", {**entry, "data_subtype": subtype}, where)
        meta = {key: value for key, value in {**entry, **known}.items() if key not in _KNOWN}
        answer = str(known.get("multiple_choice_answer") or most_frequent(answers))
        yield Question(
            question_id, name, text_of(entry, "question", where), answers, answer, str(known.get("question_type", "")), meta, short=True
        )


def _textvqa(source: QuestionSource, path: Path) -> Iterator[Question]:
    """TextVQA: {"data": [...]} with ten answers as plain strings. Source: https://textvqa.org/dataset"""
    entries = items(read_object(path, "textvqa", "data"), "data", str(path))
    for question_id, entry in by_id(entries, path).items():
        where = f"{path}: question {question_id}"
        answers = tuple(strings(entry, "answers", where))
        name = _image_name(source, "{image_id}.jpg", entry, where)
        meta = {key: entry[key] for key in ("set_name", "image_classes") if key in entry}
        yield Question(question_id, name, text_of(entry, "question", where), answers, most_frequent(answers), "text", meta, short=True)


def _vizwiz(source: QuestionSource, path: Path) -> Iterator[Question]:
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
        name, family = _image_name(source, "{image}", entry, where), str(entry.get("answer_type", ""))
        yield Question(image, name, text_of(entry, "question", where), answers, most_frequent(answers), family, meta, short=True)


def _gqa(source: QuestionSource, path: Path) -> Iterator[Question]:
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
        name = _image_name(source, "{imageId}.jpg", entry, where)
        family = str(types.get("structural") or "")
        yield Question(question_id, name, text_of(entry, "question", where), answers, "".join(answers), family, meta, short=True)


def _scienceqa(source: QuestionSource, path: Path) -> Iterator[Question]:
    """ScienceQA: problems.json and pid_splits.json beside it; multiple choice, about half without an image. Family: `subject`.

    The prompt is context, question and lettered options in one line, as LLaVA's converter writes its "CQM" input, "N/A" where the
    problem has no hint and double spaces made single, then LLaVA-1.5's request for the letter alone; the answer is that letter. Lecture
    and solution are not shown: they are what models of chain-of-thought are trained on. Images lie in SPLIT/ID/image.png.
    Source: https://github.com/lupantech/ScienceQA, LLaVA scripts/convert_sqa_to_llava_base_prompt.py and model_vqa_science.py
    """
    problems = read_mapping(path, "scienceqa", "choices")
    splits = read_object(path.with_name("pid_splits.json"), "scienceqa", str(source.split))
    if unknown := [pid for pid in splits[str(source.split)] if pid not in problems]:
        raise ValueError(
            f"{path} lacks {len(unknown)} problems of split {source.split!r} ({some(unknown)}): take both files from one release"
        )
    for pid in splits[str(source.split)]:
        entry, where = problems[pid], f"{path}: problem {pid}"
        choices = strings(entry, "choices", where)
        if not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"{where} has {len(choices)} choices: 2 to {len(LETTERS)} can be lettered")
        right = entry.get("answer")
        if right is not None and (type(right) is not int or not 0 <= right < len(choices)):
            raise ValueError(f"{where}: answer = {right!r} is no index of its {len(choices)} choices")
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        context = str(entry.get("hint") or "").strip() or "N/A"
        shown = f"Context: {context}\nQuestion: {text_of(entry, 'question', where)}\nOptions: {options}\n".replace("  ", " ").strip()
        text = f"{shown}\nAnswer with the option's letter from the given choices directly."
        fields = {**entry, "question_id": pid, "split": entry.get("split", source.split)}
        name = _image_name(source, "{split}/{question_id}/{image}", fields, where) if entry.get("image") else None
        answer = "" if right is None else LETTERS[right]
        meta = {key: entry[key] for key in ("subject", "grade", "topic", "choices") if key in entry} | {"has_hint": bool(entry.get("hint"))}
        yield Question(pid, name, text, (answer,) if answer else (), answer, str(entry.get("subject", "")), meta)


def _pope(source: QuestionSource, path: Path) -> Iterator[Question]:
    """POPE: a JSON object a line, label yes or no. One file is one way of drawing absent objects (random, popular, adversarial).

    Source: https://github.com/RUCAIBox/POPE
    """
    for number, entry in enumerate(read_lines(path)):
        where = f"{path}: line {number + 1}"
        label = text_of(entry, "label", where).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: label = {label!r} is neither yes nor no")
        question_id = entry.get("question_id", number + 1)
        name = _image_name(source, "{image}", entry, where)
        yield Question(question_id, name, text_of(entry, "text", where), (label,), label, "existence", {}, short=True)


def _llava(source: QuestionSource, path: Path) -> Iterator[Question]:
    """LLaVA's conversations: turns of "human" and "gpt" in turn; one image at most. Ids may repeat, as they do in LLaVA's own mix.

    "<image>" is taken out of the text: the image's tokens stand before the prompt, as LLaVA's training moves the mark to the front
    of its turn. A leading turn of "gpt" and turns without a reply are left out, the latter not where no turn has one.
    Source: LLaVA docs/Finetune_Custom_Data.md and llava/train/train.py (preprocess_multimodal, preprocess_v1)
    """
    for number, entry in enumerate(read_list(path, "llava", "conversations")):
        where = f"{path}: entry {number}"
        image = entry.get("image")
        turns, marks = _turns(entry, where)
        if image is not None and not isinstance(image, str):
            raise ValueError(f"{where}: image = {image!r}: one image's name a conversation")
        if marks > (image is not None):
            raise ValueError(f"{where} has <image> {marks} times and {'one image' if image else 'no image'}: once, where there is one")
        name = None if image is None else _image_name(source, "{image}", entry, where)
        text, answer = turns[0]
        answers = (answer,) if answer else ()
        yield Question(entry.get("id", number), name, text, answers, answer, "", {}, tuple(turns))


def _turns(entry: Entry, where: str) -> tuple[list[tuple[str, str]], int]:
    """(human, gpt) of each turn, without "<image>", and how often that mark was there."""
    said = [
        (str(object_of(turn, where).get("from")), text_of(object_of(turn, where), "value", where))
        for turn in items(entry, "conversations", where)
    ]
    if said and said[0][0] == "gpt":
        said = said[1:]
    if not said or [who for who, _ in said] != ["human" if place % 2 == 0 else "gpt" for place in range(len(said))]:
        raise ValueError(f"{where}: turns by {[who for who, _ in said]}, not by human and gpt in turn, the human first")
    marks = sum(text.count("<image>") for _, text in said)
    texts = [text.replace("<image>", "").strip() if "<image>" in text else text for _, text in said]
    turns = [(human, reply if reply.strip() else "") for human, reply in itertools.zip_longest(texts[::2], texts[1::2], fillvalue="")]
    return [turn for turn in turns if turn[1]] or turns[:1], marks


_PARSERS: dict[str, Callable[[QuestionSource, Path], Iterator[Question]]] = {
    "vqav2": _vqav2,
    "textvqa": _textvqa,
    "vizwiz": _vizwiz,
    "gqa": _gqa,
    "scienceqa": _scienceqa,
    "pope": _pope,
    "llava": _llava,
}
_KNOWN = {"question", "question_id", "answers", "multiple_choice_answer"}


def _image_name(source: QuestionSource, default: str, entry: Entry, where: str) -> str:
    pattern = source.image_name or default
    try:
        return pattern.format_map(dict(entry))
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        scalars = sorted(key for key, value in entry.items() if isinstance(value, (str, int)))
        raise ValueError(
            f"{where}: image_name = {pattern!r} cannot be filled in ({error!r}); its fields are {', '.join(scalars)}"
        ) from error
