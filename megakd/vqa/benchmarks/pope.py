"""POPE: a JSON object a line, label yes or no. One file is one way of drawing absent objects (random, popular, adversarial).

Source: https://github.com/RUCAIBox/POPE
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megakd.vqa.benchmarks.base import Answered, Benchmark, Question, QuestionFile
from megakd.vqa.json_files import Entry, is_id, question_text, read_lines, shown, text_of
from megakd.vqa.scores import confusion, precision_recall, ratio


class POPE(Benchmark):
    metric = "accuracy"
    caveats = (
        "an answer without the words No, no or not in its first sentence counts as yes, as in POPE's program",
        "yes_ratio is of the predictions; lmms-eval computes it from the labels, and takes 'Yes.' for wrong",
    )
    image_name = "{image}"
    submission_suffix = ".jsonl"

    def questions(self, file: QuestionFile) -> Iterator[Question]:
        seen: set[Any] = set()
        lines = read_lines(file.path, "label", 'JSON object with "text", "image" and "label"')
        for count, (number, entry) in enumerate(lines, 1):
            where = f"{file.path}: line {number}"
            label = text_of(entry, "label", where).strip().lower()
            if label not in ("yes", "no"):
                raise ValueError(f"{where}: label = {label!r} is neither yes nor no")
            question_id = entry.get("question_id", count)
            if not is_id(question_id) or question_id in seen:
                raise ValueError(f"{where}: question_id = {shown(question_id)}: a number or a text, and each once")
            seen.add(question_id)
            image, text = file.image_name(entry, where), question_text(entry, "text", where)
            yield Question(question_id, image, text, (label,), label, "existence", {}, short=True)

    def looks_like(self, value: Any) -> bool:
        return isinstance(value, dict) and {"text", "label"} <= set(value)

    def score(self, question: Question, prediction: str) -> float:
        return float(pope_says_yes(prediction) == (question.answer == "yes"))

    def totals(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """Precision, recall and F1 of "yes", 0 where undefined, and the share of "yes" among the predictions."""
        truth = [one.question.answer == "yes" for one in answered]
        predicted = [pope_says_yes(one.prediction) if one.asked else not yes for one, yes in zip(answered, truth, strict=True)]
        given = [yes for one, yes in zip(answered, predicted, strict=True) if one.asked]
        counts = confusion(predicted, truth)
        return {**precision_recall(counts), "yes_ratio": ratio(sum(given), len(given)), "confusion": counts}

    def submission(self, answered: Answered) -> Entry:
        """In the order of the label file, which POPE's program goes by."""
        return {"question_id": answered.question.question_id, "question": answered.question.text, "answer": answered.prediction}


def pope_says_yes(prediction: str) -> bool:
    """POPE's reading: "no" when the first sentence has the word No, no or not; anything else, also an empty answer, is "yes".

    Words are split at spaces, commas dropped: "NO", "nope" and "isn't" are "yes". Source: evaluate.py of https://github.com/RUCAIBox/POPE
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


BENCHMARK = POPE()
