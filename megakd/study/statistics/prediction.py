"""Which diagnostic of a pair of teacher and student tells how well the student will answer, for a teacher that was not looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megakd.study.statistics.estimate import all_alike, checked, scipy_stats

FEWEST_TEACHERS = 3  # a line through the cells of one teacher says nothing about teachers


@dataclass(frozen=True)
class Prediction:
    """How well one diagnostic predicts a score. n: cells that have both; teachers: of those.

    r2: 1 - sum of squared errors / sum of squared errors of the other teachers' mean score. 0 is a diagnostic that says nothing, and what
    misleads is below 0; None where that mean makes no error.
    mean_abs_error: in units of the score. rank_correlation: Spearman's of prediction and score; None where all are alike. A diagnostic
    that says nothing has one below 0, since a mean without a good teacher is a low one.
    All None with a `reason` where there is too little data.
    """

    name: str
    r2: float | None
    mean_abs_error: float | None
    rank_correlation: float | None
    n: int
    teachers: int
    reason: str = ""


def predictors(
    diagnostics: Mapping[str, Mapping[str, float]], scores: Mapping[str, float], teacher_of: Mapping[str, str]
) -> list[Prediction]:
    """Each diagnostic alone, best r2 first, those without one last; all three mappings are by cell.

    Leave-one-teacher-out: the score of each cell is predicted by the line of least squares through the cells of all other teachers; by
    their mean score, where the diagnostic does not vary among those. A cell without a diagnostic, a score or a teacher is left out.
    Raises ValueError for a number that is not finite.
    """
    checked(scores, "the score of cell")
    found: dict[str, list[str]] = {}
    for cell in sorted(diagnostics):
        checked(diagnostics[cell], f"of cell {cell} the diagnostic")
        for name in diagnostics[cell]:
            if cell in scores and cell in teacher_of:
                found.setdefault(name, []).append(cell)
    results = []
    for name, cells in found.items():
        x, y = np.array([diagnostics[cell][name] for cell in cells]), np.array([scores[cell] for cell in cells])
        results.append(_leave_one_out(name, x, y, np.array([teacher_of[cell] for cell in cells])))
    return sorted(results, key=lambda one: (one.r2 is None, -(one.r2 or 0.0), one.name))


def _leave_one_out(name: str, x: np.ndarray, y: np.ndarray, teacher: np.ndarray) -> Prediction:
    teachers = sorted(set(teacher.tolist()))
    if len(teachers) < FEWEST_TEACHERS:
        reason = f"{len(teachers)} teachers: to leave one out takes {FEWEST_TEACHERS}"
        return Prediction(name, None, None, None, len(x), len(teachers), reason)
    stats, predicted, mean = scipy_stats(), np.zeros_like(y, np.float64), np.zeros_like(y, np.float64)
    for held_out in teachers:
        out = teacher == held_out
        mean[out] = y[~out].mean()
        predicted[out] = mean[out]
        if not all_alike(x[~out]):
            line = stats.linregress(x[~out], y[~out])
            predicted[out] = line.intercept + line.slope * x[out]
    error, of_mean = np.square(y - predicted).sum(), np.square(y - mean).sum()
    r2 = None if all_alike(y) else float(1 - error / of_mean)
    correlation = None if all_alike(predicted) or all_alike(y) else float(stats.spearmanr(predicted, y).statistic)
    reason = "" if r2 is not None else "all scores are equal: there is nothing to predict"
    return Prediction(name, r2, float(np.abs(y - predicted).mean()), correlation, len(x), len(teachers), reason)
