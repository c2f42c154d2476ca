"""What a method gains over none, by seeds that both have; corrections for many comparisons; and when no difference is a finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megakd.study.statistics.estimate import LEVEL, Estimate, all_alike, checked, scipy_stats

MOST_FLIPPED = 13  # observations whose 2^n signs are all tried


@dataclass(frozen=True)
class Gain(Estimate):
    """A mean paired difference with its t interval; `p` is the paired t-test's, which takes the differences for normally distributed.

    sign_flip_p: of the exact test that does not, over all 2^n signs of the differences; None beyond MOST_FLIPPED of them. It cannot be
    below 2 / 2^n, a quarter for three seeds, so it finds nothing at 5 % with fewer than six. by_seed: the differences.
    """

    sign_flip_p: float | None = None
    by_seed: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Equivalence(Estimate):
    """Whether a difference is smaller than `margin`: it is at 5 % where p < 0.05. low, high: the 90 % interval of the mean.

    smallest_margin: the least for which it would be, the end of that interval that is farther from 0.
    """

    margin: float = 0.0
    smallest_margin: float | None = None


def mean_gain(with_kd: Mapping[int, float], without: Mapping[int, float]) -> Gain:
    """with_kd less without, seed by seed, over the seeds that both have; without a test, which takes scipy.

    Raises ValueError for a score that is not finite.
    """
    for scores in (with_kd, without):
        checked(scores, "the score with seed")
    by_seed = {seed: with_kd[seed] - without[seed] for seed in sorted(with_kd.keys() & without.keys())}
    if not by_seed:
        return Gain(None, None, None, 0, reason="no seed has a score both with and without")
    differences = np.array(list(by_seed.values()), dtype=np.float64)
    reason = _why_no_test(differences) or "not tested"
    return Gain(float(differences.mean()), None, None, len(differences), reason=reason, by_seed=by_seed)


def paired_gain(with_kd: Mapping[int, float], without: Mapping[int, float]) -> Gain:
    """`mean_gain` with its interval and tests. Raises ValueError for a score that is not finite, and without scipy."""
    found = mean_gain(with_kd, without)
    n = found.n
    if n < 2:
        return found
    differences, stats = np.array(list(found.by_seed.values()), dtype=np.float64), scipy_stats()
    exact = None
    if n <= MOST_FLIPPED:
        test = stats.permutation_test(
            (differences,), lambda of, axis: of.mean(axis), permutation_type="samples", vectorized=True, n_resamples=2**MOST_FLIPPED
        )
        exact = float(test.pvalue)
    if _why_no_test(differences):
        return replace(found, sign_flip_p=exact)
    t = stats.ttest_1samp(differences, 0.0)
    interval = t.confidence_interval(LEVEL)
    return replace(found, low=float(interval.low), high=float(interval.high), p=float(t.pvalue), reason="", sign_flip_p=exact)


def equivalence(differences: Sequence[float], margin: float) -> Equivalence:
    """Two one-sided t-tests: is the mean of paired differences within -margin and margin? (Schuirmann, J. Pharmacokinet. Biopharm. 1987)

    p: the larger of the two. Raises ValueError for a margin that is not positive and for a difference that is not finite.
    """
    if not margin > 0:
        raise ValueError(f"a margin of {margin}: give the largest difference that does not matter, above 0")
    checked(dict(enumerate(differences)), "the difference")
    values = np.array(differences, dtype=np.float64)
    n = len(values)
    if not n:
        return Equivalence(None, None, None, 0, reason="no differences", margin=margin)
    mean = float(values.mean())
    if reason := _why_no_test(values):
        return Equivalence(mean, None, None, n, reason=reason, margin=margin)
    stats = scipy_stats()
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    ends = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    low, high = float(ends.low), float(ends.high)
    return Equivalence(mean, low, high, n, float(max(above, below)), margin=margin, smallest_margin=max(abs(low), abs(high)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values adjusted so that, of all comparisons of a table together, one is found wrongly at most as often as the level says.

    In their order; None, for a comparison without a p value, stays None and counts for nothing. scipy has Benjamini and Hochberg's
    correction alone, which bounds the share of wrong findings instead. (Holm, Scand. J. Stat. 1979.)
    Raises ValueError for a p value that is none.
    """
    if odd := [p for p in p_values if p is not None and not 0 <= p <= 1]:
        raise ValueError(f"a p value of {odd[0]}: p values lie between 0 and 1; give None for a comparison without one")
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted


def _why_no_test(differences: np.ndarray) -> str:
    """Why a t-test says nothing of these differences; "" where it does."""
    if len(differences) < 2:
        return "one difference: an interval needs two"
    if all_alike(differences):
        return f"all {len(differences)} differences are equal: their spread is unknown"
    return ""
