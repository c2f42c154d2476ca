"""The rules by which more than one benchmark scores: VQA accuracy, and precision, recall and F1 of a yes-or-no decision.

A rule scores one question in [0, 1]; a set's accuracy is the mean. What is one benchmark's alone is in its file in `benchmarks/`.
"""

from __future__ import annotations

from collections.abc import Sequence

from megakd.vqa.normalise import normalised, trimmed

VQA_ACCURACY = "VQA accuracy"
FULL_SCORE = 3  # people besides the one left out who must agree


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy: the mean over the answers, each left out in turn, of min(1, matches among the others / 3).

    Of ten people 0, 1, 2, 3, 4 and more who agree give 0, .3, .6, .9, 1. Both sides are processed only where the people's answers
    differ: with ten times "yes", "Yes" and "yes." are wrong. Answers count one by one; the official program compares whole entries, so that
    without distinct `answer_id` ten equal ones give 0. A sole answer, which would give 0 by this formula, is an exact match.
    Source: https://visualqa.org/evaluation.html and vqaEval.py of https://github.com/GT-Vision-Lab/VQA
    """
    answer, human_answers = trimmed(prediction), [trimmed(answer) for answer in answers]
    if len(human_answers) > 1 and len(set(human_answers)) > 1:
        answer, human_answers = normalised(answer), [normalised(answer) for answer in human_answers]
    return leave_one_out(answer, human_answers)


def leave_one_out(answer: str, human_answers: Sequence[str]) -> float:
    """VQAv2's formula over processed answers, in [0, 1]; exact match with a sole answer, 0 without one."""
    if len(human_answers) == 1:
        return float(answer == human_answers[0])
    matches = sum(human == answer for human in human_answers)
    scores = (min(1.0, (matches - (human == answer)) / FULL_SCORE) for human in human_answers)
    return sum(scores) / len(human_answers) if human_answers else 0.0


def confusion(predicted: Sequence[bool], truth: Sequence[bool]) -> dict[str, int]:
    """How many of each case; true is the positive class."""
    cases = list(zip(predicted, truth, strict=True))
    return {
        "true_positive": cases.count((True, True)),
        "false_positive": cases.count((True, False)),
        "false_negative": cases.count((False, True)),
        "true_negative": cases.count((False, False)),
    }


def precision_recall(counts: dict[str, int]) -> dict[str, float]:
    """{"precision", "recall", "f1"} of a `confusion`; 0 where undefined."""
    tp, fp, fn = counts["true_positive"], counts["false_positive"], counts["false_negative"]
    return {"precision": ratio(tp, tp + fp), "recall": ratio(tp, tp + fn), "f1": ratio(2 * tp, 2 * tp + fp + fn)}


def ratio(part: int, total: int) -> float:
    """0 of nothing."""
    return part / total if total else 0.0
