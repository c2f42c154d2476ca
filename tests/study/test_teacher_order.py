"""Whether students follow their teachers: against scipy, in closed cases, and how often an interval holds the truth."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megakd.study.statistics import Estimate, Order, correlation_difference, order

TEACHERS = {"a": 0.3, "b": 0.5, "c": 0.6, "d": 0.9}
NOISE = (-0.01, 0.0, 0.01)


def students(*means: float, noise: tuple[float, ...] = NOISE) -> dict[str, dict[int, float]]:
    return {name: {seed: mean + step for seed, step in enumerate(noise)} for name, mean in zip("abcdefg", means, strict=False)}


def parts(found: Order) -> list[Estimate]:
    return [found.spearman, found.kendall, found.slope, found.wrong_pairs]


SCORES = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])] * 4), min_size=3, max_size=6)


@given(SCORES)
@settings(max_examples=60, deadline=None)
def test_every_estimate_is_scipys_of_the_mean_scores(rows: list[tuple[float, ...]]) -> None:
    teachers = {f"t{i}": row[0] for i, row in enumerate(rows)}
    found = order(teachers, {f"t{i}": dict(enumerate(row[1:])) for i, row in enumerate(rows)}, resamples=10)
    x, y = np.array([row[0] for row in rows]), np.array([np.mean(row[1:]) for row in rows])
    signs = [np.sign(x[i] - x[j]) * np.sign(round(y[i] - y[j], 9)) for i, j in itertools.combinations(range(len(x)), 2)]
    assert found.wrong_pairs.value == pytest.approx(np.mean([{1: 0.0, 0: 0.5, -1: 1.0}[sign] for sign in signs]))
    assert found.wrong_pairs.n == len(signs)
    if np.ptp(x) == 0:
        assert found.slope.value is found.spearman.value is found.kendall.value is None
        return
    assert found.slope.value == pytest.approx(stats.linregress(x, y).slope, abs=1e-9)
    if np.ptp(y) < 1e-9:
        assert found.spearman.value is found.kendall.value is None
        assert found.spearman.reason.endswith("students have one score, and so no order")
        return
    assert found.spearman.value == pytest.approx(stats.spearmanr(x, y.round(9)).statistic)
    tau = stats.kendalltau(x, y.round(9))
    assert (found.kendall.value, found.kendall.p) == (pytest.approx(tau.statistic), pytest.approx(tau.pvalue))


@pytest.mark.parametrize(
    ("teachers", "scores"),
    [
        (TEACHERS, students(0.5, 0.52, 0.49, 0.55, noise=(-0.03, 0.0, 0.05))),
        ({"a": 0.3, "b": 0.3, "c": 0.6}, students(0.5, 0.5, 0.5, noise=(0.0, 0.25)) | {"c": {0: 0.5, 1: 0.5}}),
    ],
    ids=["distinct", "ties"],
)
def test_intervals_are_those_of_scipys_statistics_on_each_resample(teachers: dict[str, float], scores: dict[str, dict[int, float]]) -> None:
    """The same draws as inside, each through scipy one at a time."""
    found = order(teachers, scores, seed=3, resamples=200)
    generator, columns, x = np.random.default_rng(3), [], np.array(list(teachers.values()))
    cells = sum(map(len, scores.values()))
    for name in teachers:
        own, seeds = np.array(list(scores[name].values())), len(scores[name])
        stretch = math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(0.975, cells - len(teachers)) / stats.norm.ppf(0.975)
        columns.append(own.mean() + stretch * (own[generator.integers(seeds, size=(200, seeds))].mean(1) - own.mean()))
    drawn = np.stack(columns, 1).round(12)

    def wrong(y: np.ndarray) -> float:
        signs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in itertools.combinations(range(len(x)), 2)]
        return float(np.mean([(1 - sign) / 2 for sign in signs]))

    each = {
        "spearman": [stats.spearmanr(x, row).statistic for row in drawn],
        "kendall": [stats.kendalltau(x, row).statistic for row in drawn],
        "slope": [stats.linregress(x, row).slope for row in drawn],
        "wrong_pairs": [wrong(row) for row in drawn],
    }
    for name, of_each in each.items():
        estimate = getattr(found, name)
        assert [estimate.low, estimate.high] == pytest.approx(list(np.quantile(of_each, [0.025, 0.975])), abs=1e-9)


@pytest.mark.parametrize(("means", "correlation", "wrong"), [((0.1, 0.3, 0.5, 0.7), 1.0, 0.0), ((0.7, 0.5, 0.3, 0.1), -1.0, 1.0)])
def test_far_from_the_noise_an_order_is_certain(means: tuple[float, ...], correlation: float, wrong: float) -> None:
    found = order(TEACHERS, students(*means))
    for estimate, value in ((found.spearman, correlation), (found.kendall, correlation), (found.wrong_pairs, wrong)):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((value, value, value))
    assert found.spearman.p == pytest.approx(2 / 24)  # of 4! orders, this one and the reverse
    assert found.students == 12


def test_permutations_give_spearmans_p() -> None:
    x, y = np.array(list(TEACHERS.values())), np.array([0.5, 0.4, 0.7, 0.6])
    own = stats.spearmanr(x, y).statistic
    others = [stats.spearmanr(x, list(other)).statistic for other in itertools.permutations(y)]
    two_sided = 2 * min(np.mean(np.array(others) >= own - 1e-9), np.mean(np.array(others) <= own + 1e-9))
    assert order(TEACHERS, students(*y)).spearman.p == pytest.approx(min(1.0, two_sided))


def test_the_same_call_gives_the_same_intervals_in_any_order_of_the_cells() -> None:
    scores = students(0.5, 0.52, 0.49, 0.55, noise=(-0.03, 0.01, 0.05))
    turned = {name: dict(reversed(by_seed.items())) for name, by_seed in reversed(scores.items())}
    first = order(TEACHERS, scores, seed=1)
    assert order(dict(reversed(TEACHERS.items())), turned, seed=1) == first
    assert order(TEACHERS, scores, seed=2).slope != first.slope


def test_means_that_differ_by_rounding_alone_tie() -> None:
    scores = {"a": {0: 0.1, 1: 0.2, 2: 0.3}, "b": {0: 0.3, 1: 0.2, 2: 0.1}, "c": {0: 0.2, 1: 0.2, 2: 0.2}}
    found = order({"a": 1.0, "b": 2.0, "c": 3.0}, scores)
    assert found.wrong_pairs.value == 0.5
    assert found.spearman.reason == "the 3 students have one score, and so no order"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_teachers_are_a_reason_and_never_nan(count: int) -> None:
    some = dict(list(TEACHERS.items())[:count])
    found = order(some, students(*[0.5, 0.6][:count]))
    for estimate in (found.spearman, found.kendall):
        assert estimate == Estimate(None, None, None, count, reason=f"{count} teachers: a rank correlation needs 3")
    assert (found.slope.value is None, found.wrong_pairs.value is None) == (count < 2, count < 2)
    assert all(estimate.reason for estimate in parts(found) if estimate.value is None)
    if count == 2:
        assert (found.slope.value, found.slope.p, found.wrong_pairs.value) == (pytest.approx(0.1 / 0.2), None, 0.0)


def test_one_seed_gives_values_without_intervals() -> None:
    found = order(TEACHERS, students(0.1, 0.2, 0.3, 0.4) | {"b": {0: 0.2}})
    for estimate in parts(found):
        assert estimate.value is not None
        assert (estimate.low, estimate.high, estimate.reason) == (None, None, "one seed of b: an interval needs two of each teacher")


def test_a_teacher_without_students_is_named_and_left_out() -> None:
    found = order(TEACHERS, students(0.1, 0.2, 0.3) | {"d": {}, "unknown": {0: 1.0}})
    assert (found.left_out, found.spearman.n, found.students) == (("d",), 3, 9)


@pytest.mark.parametrize(("teachers", "scores"), [({"a": math.nan}, {}), ({}, {"a": {7: math.inf}})])
def test_scores_that_are_not_finite_are_refused_by_name(teachers: dict[str, float], scores: dict[str, dict[int, float]]) -> None:
    with pytest.raises(ValueError, match=r"score of teacher a is nan|score with teacher a and seed 7 is inf"):
        order(teachers, scores)


def test_nineteen_of_twenty_intervals_hold_the_true_slope() -> None:
    """Five teachers of three seeds each, as the embedded study has them: the plain percentile interval would hold it in 83 % of cases."""
    generator, x = np.random.default_rng(0), np.array([0.2, 0.3, 0.5, 0.6, 0.9])
    held, repeats = 0, 300
    for repeat in range(repeats):
        y = 0.4 + 0.1 * x[:, None] + 0.02 * generator.normal(size=(5, 3))
        scores = {f"t{i}": dict(enumerate(row)) for i, row in enumerate(y)}
        slope = order({f"t{i}": one for i, one in enumerate(x)}, scores, seed=repeat, resamples=500).slope
        assert slope.low is not None
        assert slope.high is not None
        held += slope.low <= 0.1 <= slope.high
    assert 0.92 <= held / repeats <= 0.98


def test_the_difference_of_two_methods_is_of_the_cells_that_both_have() -> None:
    follows, against = students(0.1, 0.2, 0.3, 0.4), students(0.4, 0.3, 0.2, 0.1)
    found = correlation_difference(TEACHERS, follows, against)
    assert found == Estimate(2.0, 2.0, 2.0, 4)
    # A teacher and a seed that one alone has change nothing.
    more = {name: {**by_seed, 9: 0.0} for name, by_seed in follows.items()} | {"e": {0: 0.0, 1: 0.0}}
    assert correlation_difference({**TEACHERS, "e": 1.0}, more, against) == found
    fresh = {name: {seed + 10: score for seed, score in by_seed.items()} for name, by_seed in against.items()}
    assert (
        correlation_difference(TEACHERS, follows, fresh).reason
        == "0 teachers: a rank correlation needs 3 (of cells that both methods have)"
    )
    single = {name: {0: by_seed[0]} for name, by_seed in against.items()}
    alone = correlation_difference(TEACHERS, follows, single)
    assert (alone.value, alone.low, alone.reason[:8]) == (pytest.approx(2.0), None, "one seed")


def test_both_methods_of_a_difference_see_the_same_seeds() -> None:
    """What a seed adds to both methods alike is no uncertainty of their difference."""
    generator = np.random.default_rng(4)
    scores = {name: dict(enumerate(0.5 + 0.1 * generator.normal(size=3))) for name in TEACHERS}
    found = correlation_difference(TEACHERS, scores, {name: {seed: 2 * one + 3 for seed, one in by.items()} for name, by in scores.items()})
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    alone = order(TEACHERS, scores).spearman
    assert alone.low is not None
    assert alone.high is not None
    assert alone.high - alone.low > 0.5


@given(SCORES)
@settings(max_examples=40, deadline=None)
def test_no_result_is_nan_and_every_value_lies_where_it_can(rows: list[tuple[float, ...]]) -> None:
    found = order(
        {f"t{i}": row[0] for i, row in enumerate(rows)}, {f"t{i}": dict(enumerate(row[1:])) for i, row in enumerate(rows)}, resamples=50
    )
    for estimate in parts(found):
        for number in dataclasses.astuple(estimate)[:5]:
            assert number is None or math.isfinite(number)
        assert estimate.value is not None or estimate.reason
        assert estimate.low is None or estimate.high is None or estimate.low <= estimate.high
    for estimate, low in ((found.spearman, -1), (found.kendall, -1), (found.wrong_pairs, 0)):
        assert all(number is None or low - 1e-9 <= number <= 1 + 1e-9 for number in (estimate.value, estimate.low, estimate.high))
