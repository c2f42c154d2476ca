"""A-OKVQA, answered freely: a list of entries with ten direct answers. Source: https://github.com/allenai/aokvqa"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megakd.vqa.benchmarks.base import Answered, Benchmark, Question, QuestionFile, first_of, most_frequent
from megakd.vqa.json_files import Entry, by_id, question_text, read_list, strings
from megakd.vqa.normalise import trimmed
from megakd.vqa.scores import VQA_ACCURACY, vqa_accuracy


class AOKVQA(Benchmark):
    metric = VQA_ACCURACY
    image_name = "{image_id:012d}.jpg"

    def questions(self, file: QuestionFile) -> Iterator[Question]:
        for question_id, entry in by_id(read_list(file.path, "question", "direct_answers"), file.path).items():
            where = f"{file.path}: question {question_id}"
            answers = tuple(strings(entry, "direct_answers", where))
            image, text = file.image_name(entry, where), question_text(entry, "question", where)
            yield Question(question_id, image, text, answers, most_frequent(answers), "", short=True)

    def looks_like(self, value: Any) -> bool:
        return isinstance(value, list) and "direct_answers" in first_of(value)

    def score(self, question: Question, prediction: str) -> float:
        return vqa_accuracy(prediction, question.answers)

    def submission(self, answered: Answered) -> Entry:
        return {"question_id": answered.question.question_id, "answer": trimmed(answered.prediction)}


BENCHMARK = AOKVQA()
