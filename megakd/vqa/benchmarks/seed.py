"""SEED-Bench 1: four choices each; of its questions those about images, the others are about videos.

Source: https://github.com/AILab-CVC/SEED-Bench (DATASET.md), LLaVA scripts/convert_seed_for_submission.py and docs/Evaluation.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megakd.vqa.benchmarks.base import Answered, Benchmark, Question, QuestionFile, first_of
from megakd.vqa.json_files import Entry, Misfit, by_id, items, object_of, question_text, read_object, text_of

LETTERS = "ABCD"


class SEED(Benchmark):
    metric = "accuracy of the letter"
    caveats = (
        "the answer is the letter alone, as in LLaVA's program; SEED-Bench's own ranks the choices by their likelihood",
        "of image questions alone (dimensions 1 to 9), which LLaVA's program prints beside the accuracy of all",
    )
    image_name = "{data_id}"
    submission_suffix = ".jsonl"

    def questions(self, file: QuestionFile) -> Iterator[Question]:
        """Family: the dimension's name. The prompt is LLaVA's: the question, a line a choice, and the request for the letter."""
        content, videos = read_object(file.path, "questions"), 0
        if not self.looks_like(content):
            raise Misfit(file.path, 'has no "choice_a" in its first question', content)
        entries = by_id(items(content, "questions", str(file.path)), file.path)
        names = {number: name for name, number in object_of(content.get("question_type"), f"{file.path}: question_type").items()}
        for question_id, entry in entries.items():
            where = f"{file.path}: question {question_id}"
            if text_of(entry, "data_type", where) != "image":
                videos += 1
                continue
            choices = [f"{letter}. {text_of(entry, f'choice_{letter.lower()}', where)}" for letter in LETTERS]
            answer = text_of(entry, "answer", where)
            if answer not in tuple(LETTERS):
                raise ValueError(f"{where}: answer = {answer!r} is none of {', '.join(LETTERS)}")
            lines = [question_text(entry, "question", where), *choices, "Answer with the option's letter from the given choices directly."]
            family = str(names.get(entry.get("question_type_id"), ""))
            yield Question(question_id, file.image_name(entry, where), "\n".join(lines), (answer,), answer, family)
        file.notes += [f"{videos} questions about videos are left out"] if videos else []

    def looks_like(self, value: Any) -> bool:
        return isinstance(value, dict) and "choice_a" in first_of(value.get("questions"))

    def score(self, question: Question, prediction: str) -> float:
        return float(prediction == question.answer)

    def submission(self, answered: Answered) -> Entry:
        """As LLaVA's converter writes them for the leaderboard."""
        return {"question_id": answered.question.question_id, "prediction": answered.prediction}


BENCHMARK = SEED()
