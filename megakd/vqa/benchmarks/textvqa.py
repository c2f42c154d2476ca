"""TextVQA: {"data": [...]} with ten answers as plain strings. Source: https://textvqa.org/dataset"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megakd.vqa.benchmarks.base import Answered, Benchmark, Question, QuestionFile, most_frequent
from megakd.vqa.json_files import Entry, by_id, items, question_text, read_object, strings
from megakd.vqa.normalise import textvqa_normalised, trimmed
from megakd.vqa.scores import VQA_ACCURACY, leave_one_out


class TextVQA(Benchmark):
    metric = VQA_ACCURACY
    image_name = "{image_id}.jpg"

    def questions(self, file: QuestionFile) -> Iterator[Question]:
        entries = items(read_object(file.path, "data"), "data", str(file.path))
        for question_id, entry in by_id(entries, file.path).items():
            where = f"{file.path}: question {question_id}"
            answers = tuple(strings(entry, "answers", where))
            image, text = file.image_name(entry, where), question_text(entry, "question", where)
            meta = {key: entry[key] for key in ("set_name", "image_classes") if key in entry}
            yield Question(question_id, image, text, answers, most_frequent(answers), "text", meta, short=True)

    def looks_like(self, value: Any) -> bool:
        return isinstance(value, dict) and "data" in value

    def score(self, question: Question, prediction: str) -> float:
        return textvqa_accuracy(prediction, question.answers)

    def submission(self, answered: Answered) -> Entry:
        """Its EvalAI challenge takes VQAv2's entries."""
        return {"question_id": answered.question.question_id, "answer": trimmed(answered.prediction)}


def textvqa_accuracy(prediction: str, answers: tuple[str, ...]) -> float:
    """VQAv2's formula, both sides always processed, and by TextVQA's own rules. Source: TextVQAAccuracyEvaluator of mmf and LLaVA."""
    return leave_one_out(textvqa_normalised(prediction), [textvqa_normalised(answer) for answer in answers])


BENCHMARK = TextVQA()
