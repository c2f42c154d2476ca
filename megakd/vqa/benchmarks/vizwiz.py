"""VizWiz: a list without question ids, one question an image, whose name is the id in submissions.

Source: https://vizwiz.org/tasks-and-datasets/vqa/
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megakd.vqa.benchmarks.base import Answered, Benchmark, Question, QuestionFile, first_of, most_frequent
from megakd.vqa.json_files import Entry, human_answers, question_text, read_list, released, text_of, text_or
from megakd.vqa.normalise import trimmed, vizwiz_normalised
from megakd.vqa.scores import VQA_ACCURACY, confusion, leave_one_out, precision_recall

UNANSWERABLE = "unanswerable"


class VizWiz(Benchmark):
    metric = VQA_ACCURACY
    caveats = (
        "unanswerable: from the answer alone; VizWiz's answerability task ranks by a confidence, which answers do not have",
        "contractions as in VizWiz's program: most get a typographic apostrophe, which no straight one of the people matches",
    )
    image_name = "{image}"

    def questions(self, file: QuestionFile) -> Iterator[Question]:
        """Family: `answer_type`."""
        seen: set[str] = set()
        for number, entry in enumerate(released(read_list(file.path, "image", "question"))):
            where = f"{file.path}: entry {number}"
            question_id = text_of(entry, "image", where)
            if question_id in seen:
                raise ValueError(f"{where}: a second question about {question_id}, whose name is the question's id")
            seen.add(question_id)
            answers = human_answers(entry, where)
            meta = {key: entry[key] for key in ("answerable", "answer_type") if key in entry}
            image, family = file.image_name(entry, where), text_or(entry, "answer_type", where)
            text = question_text(entry, "question", where)
            yield Question(question_id, image, text, answers, most_frequent(answers), family, meta, short=True)

    def looks_like(self, value: Any) -> bool:
        fields = first_of(value)
        return isinstance(value, list) and {"image", "question"} <= fields and "conversations" not in fields

    def score(self, question: Question, prediction: str) -> float:
        return vizwiz_accuracy(prediction, question.answers)

    def groups(self, question: Question) -> Mapping[str, Iterable[str]]:
        meta = question.meta
        return {
            "answer_type": [str(meta["answer_type"])] if "answer_type" in meta else [],
            "answerable": ["yes" if meta["answerable"] else "no"] if "answerable" in meta else [],
        }

    def totals(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """How well "unanswerable" is said where `answerable` is 0: precision, recall, F1."""
        truth, predicted = [], []
        for question, prediction, asked in answered:
            if "answerable" in question.meta:
                truth.append(question.meta["answerable"] == 0)
                predicted.append(vizwiz_normalised(trimmed(prediction)) == UNANSWERABLE if asked else not truth[-1])
        if not truth:
            return {}
        return {"unanswerable": {**precision_recall(confusion(predicted, truth)), "questions": len(truth)}}

    def submission(self, answered: Answered) -> Entry:
        """Source: the page above, "Submission"; the image is the question's id."""
        return {"image": answered.question.question_id, "answer": trimmed(answered.prediction)}


def vizwiz_accuracy(prediction: str, answers: tuple[str, ...]) -> float:
    """VQAv2's formula with the prediction always processed, by VizWiz's own table of contractions, and the people's answers never.

    They are published processed; an answer that is not ("don't know.") cannot be matched. Source: VQAEval of VizWiz's Python API,
    https://vizwiz.org/tasks-and-datasets/vqa/ ("Code")
    """
    return leave_one_out(vizwiz_normalised(trimmed(prediction)), answers)


BENCHMARK = VizWiz()
