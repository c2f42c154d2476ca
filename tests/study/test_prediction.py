"""Which diagnostic predicts a score of teachers that were left out: by hand with scipy's line, and where nothing can be said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from megakd.study.statistics import Prediction, predictors

# Cells of four teachers with three seeds each: `follows` makes the score but for a little noise, `noise` does not.
TEACHERS = {f"{teacher}{seed}": teacher for teacher in "abcd" for seed in range(3)}
GENERATOR = np.random.default_rng(5)
FOLLOWS = {cell: "abcd".index(teacher) + 0.1 * GENERATOR.normal() for cell, teacher in TEACHERS.items()}
SCORES = {cell: 0.5 + 0.1 * follows + 0.003 * GENERATOR.normal() for cell, follows in FOLLOWS.items()}
DIAGNOSTICS = {cell: {"noise": GENERATOR.normal(), "follows": follows, "constant": 1.0} for cell, follows in FOLLOWS.items()}


def by_hand(name: str) -> tuple[float, float, float]:
    cells = sorted(TEACHERS)
    predicted, means = {}, {}
    for cell in cells:
        others = [other for other in cells if TEACHERS[other] != TEACHERS[cell]]
        line = stats.linregress([DIAGNOSTICS[other][name] for other in others], [SCORES[other] for other in others])
        predicted[cell] = line.intercept + line.slope * DIAGNOSTICS[cell][name]
        means[cell] = np.mean([SCORES[other] for other in others])
    errors = [SCORES[cell] - predicted[cell] for cell in cells]
    r2 = 1 - np.sum(np.square(errors)) / sum((SCORES[cell] - means[cell]) ** 2 for cell in cells)
    return r2, np.mean(np.abs(errors)), stats.spearmanr(list(predicted.values()), [SCORES[cell] for cell in cells]).statistic


def test_the_diagnostic_that_makes_the_score_comes_first() -> None:
    found = predictors(DIAGNOSTICS, SCORES, TEACHERS)
    by_name = {one.name: one for one in found}
    assert [one.name for one in found] == sorted(DIAGNOSTICS["a0"], key=lambda name: -(by_name[name].r2 or 0))
    best, noise, constant = (by_name[name] for name in ("follows", "noise", "constant"))
    assert found[0] == best
    for one in (best, noise):
        assert (one.r2, one.mean_abs_error, one.rank_correlation) == pytest.approx(by_hand(one.name))
        assert (one.n, one.teachers) == (12, 4)
    assert best.r2 is not None
    assert best.r2 > 0.95
    assert constant.r2 == 0.0


def test_cells_without_a_diagnostic_a_score_or_a_teacher_are_left_out() -> None:
    more = {**DIAGNOSTICS, "x": {"follows": 9.0}, "y": {"follows": 9.0}}
    assert predictors(more, {**SCORES, "x": 1.0}, {**TEACHERS, "y": "a"}) == predictors(DIAGNOSTICS, SCORES, TEACHERS)
    part = {cell: {"patch": one["follows"]} for cell, one in DIAGNOSTICS.items() if TEACHERS[cell] != "d"}
    both = {cell: {**DIAGNOSTICS[cell], **part.get(cell, {})} for cell in DIAGNOSTICS}
    assert {one.name: (one.n, one.teachers) for one in predictors(both, SCORES, TEACHERS)}["patch"] == (9, 3)


def test_too_few_teachers_and_equal_scores_are_reasons() -> None:
    two = {cell: teacher for cell, teacher in TEACHERS.items() if teacher in "ab"}
    for one in predictors(DIAGNOSTICS, SCORES, two):
        assert one == Prediction(one.name, None, None, None, 6, 2, "2 teachers: to leave one out takes 3")
    for one in predictors(DIAGNOSTICS, dict.fromkeys(SCORES, 0.25), TEACHERS):
        assert (one.r2, one.rank_correlation, one.reason) == (None, None, "all scores are equal: there is nothing to predict")
        assert one.mean_abs_error == pytest.approx(0.0, abs=1e-12)
    assert predictors({}, SCORES, TEACHERS) == []


def test_a_diagnostic_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="of cell a0 the diagnostic noise is nan"):
        predictors({**DIAGNOSTICS, "a0": {"noise": math.nan}}, SCORES, TEACHERS)
