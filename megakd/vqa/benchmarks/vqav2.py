"""VQAv2, and OK-VQA, whose files have the same form: questions and annotations, joined by question_id.

Source: https://visualqa.org/download.html, https://visualqa.org/evaluation.html, https://okvqa.allenai.org/download.html
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megakd.recipe import QuestionSource
from megakd.vqa.benchmarks.base import Answered, Benchmark, Question, QuestionFile, first_of, most_frequent
from megakd.vqa.json_files import Entry, Misfit, by_id, human_answers, items, question_text, read_object, released, same_ids, text_or
from megakd.vqa.normalise import trimmed
from megakd.vqa.scores import VQA_ACCURACY, vqa_accuracy

_NOT_META = {"question", "question_id", "answers", "multiple_choice_answer"}


class VQAv2(Benchmark):
    metric = VQA_ACCURACY
    image_name = "COCO_{data_subtype}_{image_id:012d}.jpg"
    annotations = True

    def questions(self, file: QuestionFile) -> Iterator[Question]:
        """Without annotations: a test set. Family: the annotations' `question_type`.

        Images of COCO: those of test-dev2015 are test2015's. `multiple_choice_answer` is VQAv2's own most frequent answer; OK-VQA has none.
        """
        path = file.path
        content = read_object(path, "questions")
        if not self.looks_like(content):
            raise Misfit(path, "has choices in its questions", content)
        by_question = by_id(items(content, "questions", str(path)), path)
        annotations: dict[Any, Entry] = {}
        if file.source.annotations is not None:
            annotations_path = Path(file.source.annotations)
            # in no variable: the annotations of a question, ten answers each, go when it is made
            listed = items(read_object(annotations_path, "annotations"), "annotations", str(annotations_path))
            annotations = by_id(released(listed), annotations_path)
            same_ids(by_question, annotations, path, annotations_path)
        subtype = text_or(content, "data_subtype", str(path)).replace("-dev", "")
        for question_id, entry in by_question.items():
            where = f"{path}: question {question_id}"
            annotation = annotations.pop(question_id, {})
            if annotation and annotation.get("image_id", entry.get("image_id")) != entry.get("image_id"):
                raise ValueError(
                    f"{where} is about image {entry.get('image_id')}, but its annotation about {annotation['image_id']}: not one release"
                )
            answers = human_answers(annotation, where)
            image = file.image_name({**entry, "data_subtype": subtype}, where)
            meta = {key: value for key, value in {**entry, **annotation}.items() if key not in _NOT_META}
            answer = text_or(annotation, "multiple_choice_answer", where) or most_frequent(answers)
            family = text_or(annotation, "question_type", where)
            text = question_text(entry, "question", where)
            yield Question(question_id, image, text, answers, answer, family, meta, short=True)

    def looks_like(self, value: Any) -> bool:
        return isinstance(value, dict) and "questions" in value and "choice_a" not in first_of(value["questions"])

    def other_file(self, value: Any) -> str | None:
        if isinstance(value, dict) and "annotations" in value:
            return "it looks like VQAv2's annotations: name it under annotations, and the questions' file here"
        return None

    def without_answers(self, source: QuestionSource) -> str:
        return "name the annotations" if source.annotations is None else super().without_answers(source)

    def score(self, question: Question, prediction: str) -> float:
        return vqa_accuracy(prediction, question.answers)

    def groups(self, question: Question) -> Mapping[str, Iterable[str]]:
        """held_out_pair: the shapes world's own field, in files of this form."""
        meta = question.meta
        answer_type = [str(meta["answer_type"])] if "answer_type" in meta else []
        return {"answer_type": answer_type, "question_type": [question.family], "held_out_pair": meta.get("held_out_pairs") or ()}

    def submission(self, answered: Answered) -> Entry:
        """Every question of the split must be there, once: https://visualqa.org/evaluation.html ("Results Format")."""
        return {"question_id": answered.question.question_id, "answer": trimmed(answered.prediction)}


BENCHMARK = VQAv2()
