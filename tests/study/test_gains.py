"""Paired gains, Holm's correction and equivalence: against scipy, by hand, and at the ends where a test has nothing to go by."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from megakd.study.statistics import Equivalence, Gain, equivalence, holm, mean_gain, paired_gain

WITH, WITHOUT = {0: 0.53, 1: 0.55, 2: 0.52, 3: 0.58}, {0: 0.50, 1: 0.51, 2: 0.53, 3: 0.52}


def test_a_gain_is_scipys_paired_t_test() -> None:
    found = paired_gain({**WITH, 9: 1.0}, {**WITHOUT, 8: 0.0})
    test = stats.ttest_rel(list(WITH.values()), list(WITHOUT.values()))
    interval = test.confidence_interval(0.95)
    assert (found.value, found.n, found.p) == (pytest.approx(0.03), 4, pytest.approx(test.pvalue))
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


@pytest.mark.parametrize("n", [2, 3, 4, 7, 13])
def test_the_exact_p_counts_all_signs(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.5, 1, n)
    means = [np.mean(np.array(signs) * differences) for signs in itertools.product((1, -1), repeat=n)]
    own = differences.mean()
    two_sided = 2 * min(np.mean(np.array(means) >= own - 1e-12), np.mean(np.array(means) <= own + 1e-12))
    found = paired_gain(dict(enumerate(differences.tolist())), dict.fromkeys(range(n), 0.0))
    assert found.sign_flip_p == pytest.approx(min(1.0, two_sided))


def test_beyond_thirteen_seeds_signs_are_not_counted() -> None:
    found = paired_gain({seed: 0.01 * seed for seed in range(14)}, dict.fromkeys(range(14), 0.0))
    assert (found.sign_flip_p, found.n) == (None, 14)
    assert found.p is not None


def test_gains_of_too_little_say_so() -> None:
    assert paired_gain({0: 1.0}, {1: 1.0}) == Gain(None, None, None, 0, reason="no seed has a score both with and without")
    assert paired_gain({0: 0.75}, {0: 0.5}) == Gain(0.25, None, None, 1, reason="one difference: an interval needs two", by_seed={0: 0.25})
    reason = "all 3 differences are equal: their spread is unknown"
    same = paired_gain({0: 0.3, 1: 0.5, 2: 0.7}, {0: 0.2, 1: 0.4, 2: 0.6})  # equal but for rounding
    assert same == Gain(
        pytest.approx(0.1), None, None, 3, reason=reason, sign_flip_p=0.25, by_seed=pytest.approx(dict.fromkeys(range(3), 0.1))
    )
    assert paired_gain(WITH, WITH).sign_flip_p == 1.0


def test_a_gain_without_its_test_is_the_same_mean() -> None:
    tested, alone = paired_gain(WITH, WITHOUT), mean_gain(WITH, WITHOUT)
    assert (alone.value, alone.n, alone.by_seed) == (tested.value, tested.n, tested.by_seed)
    assert alone.by_seed == pytest.approx({0: 0.03, 1: 0.04, 2: -0.01, 3: 0.06})
    assert (alone.low, alone.p, alone.sign_flip_p, alone.reason) == (None, None, None, "not tested")


def test_intervals_of_gains_hold_the_truth_as_often_as_they_say() -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(400):
        found = paired_gain(dict(enumerate(generator.normal(0.02, 0.01, 3))), dict(enumerate(generator.normal(0, 0.01, 3))))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.02 <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_equivalence_is_two_one_sided_tests() -> None:
    differences, margin = [0.01, -0.02, 0.005, 0.0, 0.012], 0.03
    found = equivalence(differences, margin)
    mean, error = np.mean(differences), np.std(differences, ddof=1) / math.sqrt(5)
    tails = [stats.t.sf((mean + margin) / error, 4), stats.t.cdf((mean - margin) / error, 4)]
    assert (found.value, found.n, found.p) == (pytest.approx(mean), 5, pytest.approx(max(tails)))
    assert found.smallest_margin == pytest.approx(abs(mean) + stats.t.ppf(0.95, 4) * error)
    assert (found.low, found.high) == (pytest.approx(mean - stats.t.ppf(0.95, 4) * error), pytest.approx(found.smallest_margin))


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
@settings(max_examples=50, deadline=None)
def test_the_smallest_margin_is_where_p_is_a_twentieth(differences: list[float]) -> None:
    if np.ptp(differences) < 1e-6:
        return
    smallest = equivalence(differences, 1.0).smallest_margin
    assert smallest is not None
    assert equivalence(differences, smallest).p == pytest.approx(0.05)
    wider, narrower = equivalence(differences, smallest * 1.01), equivalence(differences, smallest * 0.99)
    assert wider.p is not None
    assert narrower.p is not None
    assert wider.p < 0.05 < narrower.p


def test_equivalence_of_too_little_says_so_and_needs_a_margin() -> None:
    assert equivalence([], 0.1) == Equivalence(None, None, None, 0, reason="no differences", margin=0.1)
    assert equivalence([0.2], 0.1).reason == "one difference: an interval needs two"
    assert equivalence([0.2, 0.2], 0.1).reason == "all 2 differences are equal: their spread is unknown"
    for margin in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="give the largest difference that does not matter"):
            equivalence([0.1, 0.2], margin)
    with pytest.raises(ValueError, match="the difference 1 is nan"):
        equivalence([0.1, math.nan], 0.1)


def test_holm_by_hand() -> None:
    """The example of R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm"): 0.03 0.06 0.06 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.02), None, pytest.approx(0.04)]
    assert (holm([]), holm([None]), holm([0.9, 0.8])) == ([], [None], [1.0, 1.0])
    for odd in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p values lie between 0 and 1"):
            holm([0.5, odd])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
def test_holm_finds_what_its_step_down_procedure_finds(p_values: list[float], level: float) -> None:
    adjusted = holm(p_values)
    found, places = set(), sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(places):
        if (len(p_values) - rank) * p_values[place] > level:
            break
        found.add(place)
    assert {place for place, p in enumerate(adjusted) if p is not None and p <= level} == found
