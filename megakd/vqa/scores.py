"""Scores of answers by the rules of each benchmark: (question, prediction) pairs in, accuracies by group out.

Every rule scores one question in [0, 1]; accuracy is the mean. What a set's format means is one `Metric` in METRICS. A question that
could not be asked (a damaged image) counts as wrong in every number, whatever its rule makes of an empty answer: POPE's reads "yes".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megakd.vqa.formats import LETTERS, Question
from megakd.vqa.normalise import normalised, textvqa_normalised, trimmed, vizwiz_normalised

UNANSWERABLE = "unanswerable"
_FULL_SCORE = 3  # people besides the one left out who must agree
_LLAVA_LETTERS = "ABCDE"


class Answered(NamedTuple):
    """A question and what the model said: "" where it could not be asked."""

    question: Question
    prediction: str
    asked: bool = True


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy: the mean over the answers, each left out in turn, of min(1, matches among the others / 3).

    Of ten people 0, 1, 2, 3, 4 and more who agree give 0, .3, .6, .9, 1. Both sides are processed only where the people's answers
    differ: with ten times "yes", "Yes" and "yes." are wrong. Answers count one by one; the official program compares whole entries
    instead, so that entries without distinct `answer_id` leave each other out, and ten equal ones give 0.
    A sole answer would give 0 by this formula: it is an exact match instead.
    Source: https://visualqa.org/evaluation.html and vqaEval.py of https://github.com/GT-Vision-Lab/VQA
    """
    said, people = trimmed(prediction), [trimmed(answer) for answer in answers]
    if len(people) == 1:
        return float(said == people[0])
    if len(set(people)) > 1:
        said, people = normalised(said), [normalised(answer) for answer in people]
    return _leave_one_out(said, people)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The same formula, both sides always processed, and by TextVQA's own rules. Source: TextVQAAccuracyEvaluator of mmf and LLaVA."""
    said, people = textvqa_normalised(prediction), [textvqa_normalised(answer) for answer in answers]
    return float(said == people[0]) if len(people) == 1 else _leave_one_out(said, people)


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The same formula with the prediction always processed, by VizWiz's own table of contractions, and the people's answers never.

    They are published processed; an answer that is not ("don't know.") cannot be matched. Source: VQAEval of VizWiz's Python API,
    https://vizwiz.org/tasks-and-datasets/vqa/ ("Code")
    """
    said = vizwiz_normalised(trimmed(prediction))
    return float(said == answers[0]) if len(answers) == 1 else _leave_one_out(said, answers)


def _leave_one_out(said: str, people: Sequence[str]) -> float:
    matches = sum(answer == said for answer in people)
    scores = (min(1.0, (matches - (answer == said)) / _FULL_SCORE) for answer in people)
    return sum(scores) / len(people) if people else 0.0


def gqa_answer(prediction: str) -> str:
    """What GQA's program is given, and compares exactly: lower case, no full stop at the end. Source: LLaVA convert_gqa_for_eval.py"""
    return trimmed(prediction).rstrip(".").lower()


def pope_says_yes(prediction: str) -> bool:
    """POPE's reading: "no" when the first sentence has the word No, no or not; anything else, also an empty answer, is "yes".

    Words are split at spaces, commas dropped: "NO", "nope" and "isn't" are "yes". Source: evaluate.py of https://github.com/RUCAIBox/POPE
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def scienceqa_letter(prediction: str, choices: int) -> str | None:
    """The option that a prediction names, as LLaVA reads it: "B", "B. ...", or "The answer is B" once and with any sign after it.

    None of anything else: white space before the letter, "B." alone, two answers, a letter beyond E or that the problem does not have.
    Source: LLaVA llava/eval/eval_science_qa.py
    """
    if prediction[:1] in _LLAVA_LETTERS and (len(prediction) == 1 or prediction[1:3] == ". "):
        found = prediction[0]
    else:
        named = re.findall(r"The answer is ([A-Z]).", prediction)
        found = named[0] if len(named) == 1 else ""
    return found if found and found in _LLAVA_LETTERS[:choices] else None


def _exact(question: Question, prediction: str) -> float:
    return float(trimmed(prediction) == trimmed(question.answer))


def _scienceqa(question: Question, prediction: str) -> float:
    return float(scienceqa_letter(prediction, len(question.meta.get("choices", LETTERS))) == question.answer)


def _grade(question: Question) -> str | None:
    found = re.search(r"\d+", str(question.meta.get("grade", "")))
    return None if found is None else "1-6" if int(found[0]) <= 6 else "7-12"


def _context(question: Question) -> list[str]:
    """A problem may have both a picture and a hint: it then counts in both groups, as in ScienceQA's own tables."""
    found = [name for name, there in (("image", question.image), ("text", question.meta.get("has_hint"))) if there]
    return found or ["none"]


def _pope_totals(pairs: Sequence[Answered]) -> dict[str, Any]:
    """Precision, recall and F1 of "yes", 0 where undefined, and the share of "yes" among the predictions."""
    truth = [pair.question.answer == "yes" for pair in pairs]
    said = [pope_says_yes(pair.prediction) if pair.asked else not yes for pair, yes in zip(pairs, truth, strict=True)]
    yes = list(zip(said, truth, strict=True))
    tp, fp, fn, tn = (yes.count(case) for case in ((True, True), (True, False), (False, True), (False, False)))
    predicted = [says for pair, says in zip(pairs, said, strict=True) if pair.asked]
    return {
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": _ratio(sum(predicted), len(predicted)),
        "confusion": {"true_positive": tp, "false_positive": fp, "false_negative": fn, "true_negative": tn},
    }


def _answerability(pairs: Sequence[Answered]) -> dict[str, Any]:
    """How well "unanswerable" is said where `answerable` is 0: precision, recall, F1. VizWiz's own task ranks by confidence instead."""
    known = []
    for question, said, asked in pairs:
        if "answerable" in question.meta:
            truth = question.meta["answerable"] == 0
            known.append((vizwiz_normalised(trimmed(said)) == UNANSWERABLE if asked else not truth, truth))
    if not known:
        return {}
    tp, fp, fn = (known.count(case) for case in ((True, True), (True, False), (False, True)))
    f1 = {"precision": _ratio(tp, tp + fp), "recall": _ratio(tp, tp + fn), "f1": _ratio(2 * tp, 2 * tp + fp + fn)}
    return {"unanswerable": {**f1, "questions": len(known)}}


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _gqa_right(question: Question, prediction: str) -> float:
    return float(gqa_answer(prediction) == question.answer)


def _balanced(question: Question) -> bool:
    return bool(question.meta["isBalanced"])


def _gqa_totals(pairs: Sequence[Answered]) -> dict[str, Any]:
    balanced = [pair for pair in pairs if _balanced(pair.question)]
    return _consistency(balanced, pairs) | _distribution(balanced)


def _consistency(balanced: Sequence[Answered], pairs: Sequence[Answered]) -> dict[str, Any]:
    """For each balanced question that is answered rightly the accuracy over those it entails, balanced or not; the mean of these.

    Source: "Consistency" of GQA's eval.py (arXiv 1902.09506, section 4.4), which wants every entailed question to be in the set.
    """
    right = {question.question_id: asked and _gqa_right(question, said) for question, said, asked in pairs}
    scores = []
    for question, _, _ in balanced:
        entailed = [other for other in question.meta["entailed"] if other != question.question_id]
        if right[question.question_id] and entailed and all(other in right for other in entailed):
            scores.append(sum(right[other] for other in entailed) / len(entailed))
    return {"consistency": {"accuracy": sum(scores) / len(scores), "questions": len(scores)}} if scores else {}


def _distribution(pairs: Sequence[Answered]) -> dict[str, Any]:
    """Distance of the predicted answers' distribution to the true one, chi-square averaged over the groups; 0 is equal.

    Source: "Distribution" of GQA's eval.py (arXiv 1902.09506, section 4.4), a hundredth of it, as there
    """
    groups: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    for question, prediction, _ in pairs:
        if (group := question.meta["groups"].get("global")) is not None:
            gold, said = groups.setdefault(group, ({}, {}))
            gold[question.answer] = gold.get(question.answer, 0) + 1
            said[gqa_answer(prediction)] = said.get(gqa_answer(prediction), 0) + 1
    if not groups:
        return {}
    asked = sum(sum(gold.values()) for gold, _ in groups.values())
    distances = (
        sum(gold.values()) * sum((said.get(answer, 0) - count) ** 2 / count for answer, count in gold.items())
        for gold, said in groups.values()
    )
    return {"distribution": sum(distances) / asked / 100}


Groups = Callable[[Question], Iterable[str]]


def _field(name: str) -> Groups:
    return lambda question: [str(question.meta[name])] if name in question.meta else []


def _gqa_type(name: str) -> Groups:
    return lambda question: [str(kind)] if (kind := question.meta["types"].get(name)) else []


def _gqa_answers(question: Question) -> list[str]:
    """Open or binary, as in GQA's tables; neither where the file does not say what structure the question has."""
    return [] if not question.family else ["open" if question.family == "query" else "binary"]


@dataclass(frozen=True)
class Metric:
    """name and caveats: said in the results. score: of one question with answers. by: groups of questions, by what they are grouped.

    totals: numbers of all questions with answers. counts: which questions the benchmark scores; the others are answered and left out.
    """

    name: str
    score: Callable[[Question, str], float]
    by: Mapping[str, Groups] = field(default_factory=dict)
    totals: Callable[[Sequence[Answered]], dict[str, Any]] = lambda _: {}
    counts: Callable[[Question], bool] = lambda _: True
    caveats: tuple[str, ...] = ()


METRICS: Mapping[str, Metric] = {
    "vqav2": Metric(
        "VQA accuracy",
        lambda question, said: vqa_accuracy(said, question.answers),
        {
            "answer_type": _field("answer_type"),
            "question_type": lambda question: [question.family],
            "held_out_pair": lambda question: question.meta.get("held_out_pairs") or (),  # the shapes world's own field
        },
    ),
    "textvqa": Metric("VQA accuracy", lambda question, said: textvqa_accuracy(said, question.answers)),
    "vizwiz": Metric(
        "VQA accuracy",
        lambda question, said: vizwiz_accuracy(said, question.answers),
        {
            "answer_type": _field("answer_type"),
            "answerable": lambda question: ["yes" if question.meta["answerable"] else "no"] if "answerable" in question.meta else [],
        },
        _answerability,
        caveats=(
            "unanswerable: from the answer alone; VizWiz's answerability task ranks by a confidence, which answers do not have",
            "contractions as in VizWiz's program: most get a typographic apostrophe, which no straight one of the people matches",
        ),
    ),
    "gqa": Metric(
        "exact match",
        _gqa_right,
        {
            "structural": _gqa_type("structural"),
            "semantic": _gqa_type("semantic"),
            "answer": _gqa_answers,
        },
        _gqa_totals,
        counts=_balanced,
        caveats=(
            "balanced questions alone, as in GQA's program; validity and plausibility need files that are not read",
            "consistency: of questions with all those that they entail in this set",
        ),
    ),
    "scienceqa": Metric(
        "accuracy of the letter",
        _scienceqa,
        {
            "subject": _field("subject"),
            "context": _context,
            "grade": lambda question: [grade] if (grade := _grade(question)) else [],
        },
        caveats=(
            "an answer that names no option is wrong, as in LLaVA's program; ScienceQA's own draws one at random",
            "as in LLaVA's program 'B', 'B. ...' and one 'The answer is B.' name an option, and nothing else; a sixth option has no letter",
        ),
    ),
    "pope": Metric(
        "accuracy",
        lambda question, said: float(pope_says_yes(said) == (question.answer == "yes")),
        totals=_pope_totals,
        caveats=(
            "an answer without the words No, no or not in its first sentence counts as yes, as in POPE's program",
            "yes_ratio is of the predictions; lmms-eval computes it from the labels, and takes 'Yes.' for wrong",
        ),
    ),
    "llava": Metric("exact match of the first answer", _exact),
}


def score(kind: str, pairs: Sequence[Answered]) -> dict[str, Any]:
    """{"metric", "accuracy", "questions", "by_family": {family: {"accuracy", "questions"}}, "by_...", ..., "caveats"}

    kind: the format of the set. Questions without an answer are left out; where none has one (a test set), accuracy is None.
    """
    metric = METRICS[kind]
    known = [pair for pair in pairs if pair.question.answers]
    scored = [pair for pair in known if metric.counts(pair.question)]
    found: dict[str, Any] = {"metric": metric.name, "accuracy": None, "questions": len(scored)}
    caveats = [*metric.caveats, *_caveats(metric, pairs, scored)]
    if scored:
        scores = [metric.score(question, said) if asked else 0.0 for question, said, asked in scored]
        found["accuracy"] = sum(scores) / len(scores)
        by: dict[str, Groups] = {"family": lambda question: [question.family], **metric.by}
        for name, groups in by.items():
            if parts := _by(scored, scores, groups):
                found[f"by_{name}"] = parts
        found |= metric.totals(known)
    return found | {"caveats": caveats}


def _by(scored: Sequence[Answered], scores: Sequence[float], groups: Groups) -> dict[str, dict[str, float]]:
    parts: dict[str, list[float]] = {}
    for pair, points in zip(scored, scores, strict=True):
        for group in groups(pair.question):
            if group:
                parts.setdefault(group, []).append(points)
    return {group: {"accuracy": sum(parts[group]) / len(parts[group]), "questions": len(parts[group])} for group in sorted(parts)}


def _caveats(metric: Metric, pairs: Sequence[Answered], scored: Sequence[Answered]) -> list[str]:
    """What this set's questions make of the metric."""
    found = []
    if not scored:
        return ["no question has an answer to compare with: the benchmark's server scores the submission"]
    if lost := sum(not pair.asked for pair in scored):
        found.append(
            f"{lost} of {len(scored)} questions could not be asked (the image is damaged, or they are too long) and count as wrong"
        )
    if left := len(pairs) - len(scored):
        found.append(f"{left} of {len(pairs)} questions are not scored: they have no answer, or the benchmark leaves them out")
    if metric.name == "VQA accuracy":
        sole = sum(len(pair.question.answers) == 1 for pair in scored)
        few = sum(1 < len(pair.question.answers) <= _FULL_SCORE for pair in scored)
        if sole:
            found.append(f"{sole} of {len(scored)} questions have one answer: exact match, as the formula for ten people would give 0")
        if few:
            found.append(f"{few} of {len(scored)} questions have two or three answers: by the formula none of them can score 1")
    return found
