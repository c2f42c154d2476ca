"""GQA: {question id: {...}}, one answer, compared exactly.

Source: https://cs.stanford.edu/people/dorarad/gqa/download.html, and eval.py of https://cs.stanford.edu/people/dorarad/gqa/evaluate.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megakd.vqa.benchmarks.base import Answered, Benchmark, Question, QuestionFile, first_of
from megakd.vqa.json_files import Entry, object_or_empty, question_text, read_mapping, strings, text_of, text_or
from megakd.vqa.normalise import trimmed


class GQA(Benchmark):
    metric = "exact match"
    caveats = (
        "balanced questions alone, as in GQA's program; validity and plausibility need files that are not read",
        "consistency: of questions with all those that they entail in this set",
    )
    image_name = "{imageId}.jpg"

    def questions(self, file: QuestionFile) -> Iterator[Question]:
        """Family: `types.structural` (verify, query, choose, logical, compare)."""
        for question_id, entry in read_mapping(file.path, "imageId").items():
            where = f"{file.path}: question {question_id}"
            answers = (text_of(entry, "answer", where),) if "answer" in entry else ()
            types = object_or_empty(entry, "types", where)
            meta = {
                "types": types,
                "groups": object_or_empty(entry, "groups", where),
                "isBalanced": entry.get("isBalanced") is not False,
                "entailed": strings(entry, "entailed", where),
            }
            image, family = file.image_name(entry, where), text_or(types, "structural", where)
            text = question_text(entry, "question", where)
            yield Question(question_id, image, text, answers, "".join(answers), family, meta, short=True)

    def looks_like(self, value: Any) -> bool:
        return isinstance(value, dict) and "imageId" in first_of(value)

    def score(self, question: Question, prediction: str) -> float:
        return float(gqa_answer(prediction) == question.answer)

    def counts(self, question: Question) -> bool:
        return bool(question.meta["isBalanced"])

    def groups(self, question: Question) -> Mapping[str, Iterable[str]]:
        """answer: open or binary, as in GQA's tables; neither where the file does not say what structure the question has."""
        types = question.meta["types"]
        named = {name: [str(types[name])] if types.get(name) else [] for name in ("structural", "semantic")}
        return {**named, "answer": [] if not question.family else ["open" if question.family == "query" else "binary"]}

    def totals(self, answered: Sequence[Answered]) -> dict[str, Any]:
        balanced = [one for one in answered if self.counts(one.question)]
        return self._consistency(balanced, answered) | _distribution(balanced)

    def _consistency(self, balanced: Sequence[Answered], answered: Sequence[Answered]) -> dict[str, Any]:
        """For each balanced question that is answered rightly the accuracy over those it entails, balanced or not; the mean of these.

        Source: "Consistency" of GQA's eval.py (arXiv 1902.09506, section 4.4), which wants every entailed question to be in the set.
        """
        right = {question.question_id: asked and self.score(question, prediction) for question, prediction, asked in answered}
        scores = []
        for question, _, _ in balanced:
            entailed = [other for other in question.meta["entailed"] if other != question.question_id]
            if right[question.question_id] and entailed and all(other in right for other in entailed):
                scores.append(sum(right[other] for other in entailed) / len(entailed))
        return {"consistency": {"accuracy": sum(scores) / len(scores), "questions": len(scores)}} if scores else {}

    def submission(self, answered: Answered) -> Entry:
        return {"questionId": answered.question.question_id, "prediction": gqa_answer(answered.prediction)}


def gqa_answer(prediction: str) -> str:
    """What GQA's program is given, and compares exactly: lower case, no full stop at the end. Source: LLaVA convert_gqa_for_eval.py"""
    return trimmed(prediction).rstrip(".").lower()


def _distribution(answered: Sequence[Answered]) -> dict[str, Any]:
    """Distance of the predicted answers' distribution to the true one, chi-square averaged over the groups; 0 is equal.

    Source: "Distribution" of GQA's eval.py (arXiv 1902.09506, section 4.4), a hundredth of it, as there
    """
    groups: dict[str, tuple[Counter[str], Counter[str]]] = {}
    for question, prediction, _ in answered:
        if (group := question.meta["groups"].get("global")) is not None:
            gold, predicted = groups.setdefault(group, (Counter(), Counter()))
            gold[question.answer] += 1
            predicted[gqa_answer(prediction)] += 1
    if not groups:
        return {}
    distances = (
        gold.total() * sum((predicted[answer] - count) ** 2 / count for answer, count in gold.items())
        for gold, predicted in groups.values()
    )
    return {"distribution": sum(distances) / sum(gold.total() for gold, _ in groups.values()) / 100}


BENCHMARK = GQA()
