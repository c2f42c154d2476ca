"""LLaVA's conversations: turns of "human" and "gpt" in turn; one image at most. Ids may repeat, as they do in LLaVA's own mix.

Source: LLaVA docs/Finetune_Custom_Data.md and llava/train/train.py (preprocess_multimodal, preprocess_v1, preprocess_plain)
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from megakd.recipe import QuestionSource
from megakd.vqa.benchmarks.base import Answered, Benchmark, Question, QuestionFile, first_of
from megakd.vqa.json_files import Entry, is_id, items, object_of, read_list, released, shown, text_of
from megakd.vqa.normalise import trimmed


class Llava(Benchmark):
    metric = "exact match of the first answer"
    image_name = "{image}"
    plain = True
    skips_unanswered = True

    def questions(self, file: QuestionFile) -> Iterator[Question]:
        """A conversation each.

        "<image>" is taken out of the text: the image's tokens stand before the prompt, as LLaVA's training moves the mark to the front
        of its turn. A leading turn of "gpt" and turns without a reply are left out, the latter not where no turn has one. Plain ones
        are captions: LLaVA's preprocess_plain drops what the human says, and takes one turn with an image alone.
        """
        changes = Counter[str]()
        for number, entry in enumerate(released(read_list(file.path, "conversations"))):
            where = f"{file.path}: entry {number}"
            image = entry.get("image")
            turns, marks = _turns(entry, where, changes)
            if image is not None and not isinstance(image, str):
                raise ValueError(f"{where}: image = {shown(image)}: one image's name a conversation")
            if marks > (image is not None):
                raise ValueError(f"{where} has <image> {marks} times and {'one image' if image else 'no image'}: once, where there is one")
            question_id = number if entry.get("id") is None else entry["id"]
            if not is_id(question_id):
                raise ValueError(f"{where}: id = {shown(question_id)}: a number or a text")
            name = None if image is None else file.image_name(entry, where)
            if file.source.plain and (len(turns) > 1 or image is None):
                raise ValueError(f"{where}: plain = true takes an image and its caption, this has {len(turns)} turns and {shown(image)}")
            turns = [("", turns[0][1])] if file.source.plain else turns
            text, answer = turns[0]
            answers = (answer,) if answer else ()
            yield Question(question_id, name, text, answers, answer, "", {}, tuple(turns))
        file.notes += [f"{count} {what}" for what, count in changes.items() if count]

    def looks_like(self, value: Any) -> bool:
        return isinstance(value, list) and "conversations" in first_of(value)

    def without_answers(self, source: QuestionSource) -> str:
        return f"gpt says nothing in {source.questions!r}, which is for evaluation alone"

    def score(self, question: Question, prediction: str) -> float:
        return float(trimmed(prediction) == trimmed(question.answer))

    def submission(self, answered: Answered) -> None:
        """No server, and no program of its own that reads one."""


def _turns(entry: Entry, where: str, changes: Counter[str]) -> tuple[list[tuple[str, str]], int]:
    """(human, gpt) of each turn, without "<image>", and how often that mark was there. changes: counts what does not stay as it was."""
    turns = [
        (text_of(object_of(turn, where), "from", where), text_of(turn, "value", where)) for turn in items(entry, "conversations", where)
    ]
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
        changes["conversations begin with a turn of gpt, which is left out"] += 1
    speakers = [speaker for speaker, _ in turns]
    if not turns or speakers != ["human" if place % 2 == 0 else "gpt" for place in range(len(turns))]:
        raise ValueError(f"{where}: turns by {shown(speakers)}, not by human and gpt in turn, the human first")
    marks = sum(text.count("<image>") for _, text in turns)
    changes["conversations have <image> behind their first question: the image stands before it"] += marks > turns[0][1].count("<image>")
    texts = [text.replace("<image>", "").strip() if "<image>" in text else text for _, text in turns]
    pairs = [(human, reply if reply.strip() else "") for human, reply in itertools.zip_longest(texts[::2], texts[1::2], fillvalue="")]
    kept = [pair for pair in pairs if pair[1]] or pairs[:1]
    changes["turns without a reply are left out"] += len(pairs) - len(kept)
    if any(not human.strip() for human, _ in kept[1:]):  # the first may be empty: a caption, or text alone
        raise ValueError(f"{where} has a turn in which nothing is asked: take it out")
    return kept, marks


BENCHMARK = Llava()
