"""ScienceQA: problems.json and pid_splits.json beside it; multiple choice, about half without an image.

Source: https://github.com/lupantech/ScienceQA, LLaVA scripts/convert_sqa_to_llava_base_prompt.py and model_vqa_science.py
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megakd.vqa.benchmarks.base import Answered, Benchmark, Question, QuestionFile, first_of
from megakd.vqa.json_files import Entry, question_text, read_mapping, read_object, some, strings, text_or

LETTERS = "ABCDEFGHIJ"
_LLAVA_LETTERS = "ABCDE"


class ScienceQA(Benchmark):
    metric = "accuracy of the letter"
    caveats = (
        "an answer that names no option is wrong, as in LLaVA's program; ScienceQA's own draws one at random",
        "as in LLaVA's program 'B', 'B. ...' and one 'The answer is B.' name an option, and nothing else; a sixth option has no letter",
    )
    image_name = "{split}/{question_id}/{image}"
    split = True
    submission_suffix = ".jsonl"

    def questions(self, file: QuestionFile) -> Iterator[Question]:
        """Those of the source's split. Family: `subject`. Images lie in SPLIT/ID/image.png.

        The prompt is context, question and lettered options in one line, as LLaVA's converter writes its "CQM" input, "N/A" where the
        problem has no hint and double spaces made single, then LLaVA-1.5's request for the letter alone; the answer is that letter. Lecture
        and solution are not shown: they are what models of chain-of-thought are trained on.
        """
        path, split = file.path, str(file.source.split)
        problems = read_mapping(path, "choices")
        splits_path = path.with_name("pid_splits.json")
        pids = strings(read_object(splits_path, split), split, str(splits_path))
        if twice := [pid for pid, count in Counter(pids).items() if count > 1]:
            raise ValueError(f"{splits_path}: split {split!r} names {len(twice)} problems twice ({some(twice)}): once each")
        if unknown := [pid for pid in pids if pid not in problems]:
            raise ValueError(f"{path} lacks {len(unknown)} problems of split {split!r} ({some(unknown)}): take both files from one release")
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
            problem = f"Context: {context}\nQuestion: {question_text(entry, 'question', where)}\nOptions: {options}\n"
            text = f"{problem.replace('  ', ' ').strip()}\nAnswer with the option's letter from the given choices directly."
            fields = {**entry, "question_id": pid, "split": entry.get("split", split)}
            image = file.image_name(fields, where) if entry.get("image") else None
            answer = "" if right is None else LETTERS[right]
            meta = {key: entry[key] for key in ("subject", "grade", "topic", "choices") if key in entry}
            meta["has_hint"] = bool(entry.get("hint"))
            yield Question(pid, image, text, (answer,) if answer else (), answer, text_or(entry, "subject", where), meta)

    def looks_like(self, value: Any) -> bool:
        return isinstance(value, dict) and "choices" in first_of(value)

    def score(self, question: Question, prediction: str) -> float:
        return float(scienceqa_letter(prediction, len(question.meta.get("choices", LETTERS))) == question.answer)

    def groups(self, question: Question) -> Mapping[str, Iterable[str]]:
        """context: a problem may have both a picture and a hint; it then counts in both groups, as in ScienceQA's own tables."""
        meta = question.meta
        context = [name for name, shown in (("image", question.image), ("text", meta.get("has_hint"))) if shown]
        grade = re.search(r"\d+", str(meta.get("grade", "")))
        return {
            "subject": [str(meta["subject"])] if "subject" in meta else [],
            "context": context or ["none"],
            "grade": [] if grade is None else ["1-6" if int(grade[0]) <= 6 else "7-12"],
        }

    def submission(self, answered: Answered) -> Entry:
        """As LLaVA's model_vqa_science.py writes them and its eval_science_qa.py reads them, which knows a picture by "<image>"."""
        question = answered.question
        prompt = f"<image>\n{question.text}" if question.image is not None else question.text
        return {"question_id": question.question_id, "prompt": prompt, "text": answered.prediction}


def scienceqa_letter(prediction: str, choices: int) -> str | None:
    """The option that a prediction names, as LLaVA reads it: "B", "B. ...", or "The answer is B" once and with any sign after it.

    None of anything else: white space before the letter, "B." alone, two answers, a letter beyond E or that the problem does not have.
    Source: LLaVA llava/eval/eval_science_qa.py
    """
    if prediction[:1] in _LLAVA_LETTERS and (len(prediction) == 1 or prediction[1:3] == ". "):
        letter = prediction[0]
    else:
        named = re.findall(r"The answer is ([A-Z]).", prediction)
        letter = named[0] if len(named) == 1 else ""
    return letter if letter and letter in _LLAVA_LETTERS[:choices] else None


BENCHMARK = ScienceQA()
