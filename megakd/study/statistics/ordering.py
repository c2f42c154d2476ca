"""Whether stronger teachers make better students: rank correlations, the slope, and teacher pairs in the wrong order.

A teacher counts once, with the mean score of its students over the seeds. Intervals are of a bootstrap that resamples seeds within each
teacher: they say what other seeds would have given with these teachers. p values are of the teachers instead: how often teachers without
an influence would be in so clear an order by chance.

The plain percentile interval is too narrow at few seeds: the mean of n resampled scores varies by (n - 1) / n of what the mean of n seeds
does, a third less at three, and a spread that few seeds show may be a small one by luck. So each resampled mean is stretched away from the
teacher's by sqrt(n / (n - 1)) and by Student's over the normal quantile: Hesterberg's expanded percentile interval (The American
Statistician 69, 2015), with the quantile's degrees of freedom counted over all teachers, students less teachers.

Legend: R resamples, T teachers, P pairs of teachers, S seeds of a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megakd.study.statistics.estimate import LEVEL, Estimate, all_alike, checked, scipy_stats

Scores = Mapping[str, float]
ScoresBySeed = Mapping[str, Mapping[int, float]]

RESAMPLES = 10_000
FEWEST_TEACHERS = 3  # of which a rank correlation can be anything but 1 and -1


@dataclass(frozen=True)
class Order:
    """How students follow their teachers. `n` of the correlations and of the slope counts teachers, that of wrong_pairs pairs of them.

    spearman; kendall: tau-b, which allows for ties; slope: of the line of least squares through the mean student scores.
    wrong_pairs: share of the pairs of teachers of which the stronger has the weaker student. A tie, of teachers or of students, is half of
    one, so that 0.5 is chance; it is (1 - tau-a) / 2.
    students: cells in all. left_out: teachers that have a score and no student.
    """

    spearman: Estimate
    kendall: Estimate
    slope: Estimate
    wrong_pairs: Estimate
    students: int
    left_out: tuple[str, ...] = ()


def order(teacher_scores: Scores, student_scores: ScoresBySeed, *, seed: int = 0, resamples: int = RESAMPLES) -> Order:
    """Of students of one kind and method with their teachers. seed: of the bootstrap, whose intervals are the same at every call.

    p of the correlations: Spearman's by the permutations of the teachers, all of them up to seven teachers; Kendall's as
    scipy.stats.kendalltau; the slope's as scipy.stats.linregress. Raises ValueError for a score that is not finite.
    """
    names, seeds_of = _teachers(teacher_scores, student_scores)
    teacher_T = np.array([teacher_scores[name] for name in names], dtype=np.float64)
    mean_T = _without_rounding(np.array([np.mean(seeds_of[name]) for name in names], dtype=np.float64))
    drawn_RT, silent = _resampled_means([seeds_of[name] for name in names], names, np.random.default_rng(seed), resamples)
    stats = scipy_stats()
    count, pairs = len(names), len(names) * (len(names) - 1) // 2
    unranked = _why_unranked(teacher_T, mean_T)

    def interval(value: float, of_resamples: Any, n: int, p: float | None = None) -> Estimate:
        if drawn_RT is None:
            return Estimate(value, None, None, n, p, silent)
        return Estimate(value, *_percentiles(of_resamples(drawn_RT)), n, p)

    if unranked:
        spearman = kendall = Estimate(None, None, None, count, reason=unranked)
    else:
        spearman = interval(
            float(stats.spearmanr(teacher_T, mean_T).statistic), lambda of_RT: _spearman(teacher_T, of_RT), count,
            _permuted(teacher_T, mean_T, seed),
        )  # fmt: skip
        tau = stats.kendalltau(teacher_T, mean_T)
        kendall = interval(float(tau.statistic), lambda of_RT: _kendall(teacher_T, of_RT), count, float(tau.pvalue))
    if count < 2 or all_alike(teacher_T):
        few = f"{count} teachers" if count < 2 else f"the {count} teachers have one score"
        slope = Estimate(None, None, None, count, reason=f"{few}: a slope needs two that differ")
    else:
        line = stats.linregress(teacher_T, mean_T)
        p = None if count == 2 or all_alike(mean_T) else float(line.pvalue)
        slope = interval(float(line.slope), lambda of_RT: _slope(teacher_T, of_RT), count, p)
    if pairs:
        wrong = interval(float(_wrong(teacher_T, mean_T[None])[0]), lambda of_RT: _wrong(teacher_T, of_RT), pairs)
    else:
        wrong = Estimate(None, None, None, 0, reason=f"{count} teachers: a pair needs two")
    left_out = tuple(name for name in sorted(teacher_scores) if name not in names)
    return Order(spearman, kendall, slope, wrong, sum(map(len, seeds_of.values())), left_out)


def correlation_difference(
    teacher_scores: Scores, by_method: ScoresBySeed, by_plain: ScoresBySeed, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Spearman's correlation with the teachers under one method, less that under another, such as plain distillation.

    Both are of the cells that both methods have: the same teachers, and of each the same seeds; a resample draws the same seeds for both.
    `n` counts teachers. Raises ValueError for a score that is not finite.
    """
    shared = {name: by_method[name].keys() & by_plain[name].keys() for name in by_method.keys() & by_plain.keys() & teacher_scores.keys()}
    first = {name: {seed: by_method[name][seed] for seed in seeds} for name, seeds in shared.items()}
    second = {name: {seed: by_plain[name][seed] for seed in seeds} for name, seeds in shared.items()}
    names, first_of = _teachers(teacher_scores, first)
    _, second_of = _teachers(teacher_scores, second)
    teacher_T = np.array([teacher_scores[name] for name in names], dtype=np.float64)
    means = [_without_rounding(np.array([np.mean(of[name]) for name in names], np.float64)) for of in (first_of, second_of)]
    if reason := _why_unranked(teacher_T, means[0]) or _why_unranked(teacher_T, means[1]):
        return Estimate(None, None, None, len(names), reason=f"{reason} (of cells that both methods have)")
    one, other = (float(_spearman(teacher_T, mean_T[None])[0]) for mean_T in means)
    # Equal generators draw equal seeds.
    draws = [_resampled_means([of[name] for name in names], names, np.random.default_rng(seed), resamples) for of in (first_of, second_of)]
    (first_RT, silent), (second_RT, _) = draws
    if first_RT is None or second_RT is None:
        return Estimate(one - other, None, None, len(names), reason=f"{silent} (in cells that both methods have)")
    low, high = _percentiles(_spearman(teacher_T, first_RT) - _spearman(teacher_T, second_RT))
    return Estimate(one - other, low, high, len(names))


def _teachers(teacher_scores: Scores, student_scores: ScoresBySeed) -> tuple[list[str], dict[str, np.ndarray]]:
    """Teachers with a student, in one order for every order of the cells, and the scores of each by seed."""
    checked(teacher_scores, "the score of teacher")
    for name, by_seed in student_scores.items():
        checked(by_seed, f"the score with teacher {name} and seed")
    names = [name for name in sorted(teacher_scores) if student_scores.get(name)]
    return names, {name: np.array([student_scores[name][one] for one in sorted(student_scores[name])], np.float64) for name in names}


def _resampled_means(
    scores: list[np.ndarray], names: list[str], generator: np.random.Generator, resamples: int
) -> tuple[np.ndarray | None, str]:
    """(R, T) means over seeds drawn anew within each teacher; None with the reason where a teacher has one seed alone."""
    if single := [name for name, of in zip(names, scores, strict=True) if len(of) < 2]:
        return None, f"one seed of {', '.join(single)}: an interval needs two of each teacher"
    stats, means, freedom = scipy_stats(), [], sum(map(len, scores)) - len(scores)
    for of_S in scores:
        seeds, end = len(of_S), (1 + LEVEL) / 2
        drawn_R = of_S[generator.integers(seeds, size=(resamples, seeds))].mean(1)
        stretch = math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(end, freedom) / stats.norm.ppf(end)
        means.append(of_S.mean() + stretch * (drawn_R - of_S.mean()))
    return _without_rounding(np.stack(means, axis=1)) if means else np.zeros((resamples, 0)), ""


def _without_rounding(means: np.ndarray) -> np.ndarray:
    """Means to twelve digits, so that what differs by the order of additions alone is a tie."""
    largest = np.abs(means).max(initial=0.0)
    return means if largest == 0 else np.round(means / largest, 12) * largest


def _why_unranked(teacher_T: np.ndarray, mean_T: np.ndarray) -> str:
    """Why teachers and students have no rank correlation; "" where they have one."""
    if len(teacher_T) < FEWEST_TEACHERS:
        return f"{len(teacher_T)} teachers: a rank correlation needs {FEWEST_TEACHERS}"
    for whose, values in (("teachers", teacher_T), ("students", mean_T)):
        if all_alike(values):
            return f"the {len(values)} {whose} have one score, and so no order"
    return ""


def _percentiles(of_resamples_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(of_resamples_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _permuted(teacher_T: np.ndarray, mean_T: np.ndarray, seed: int) -> float:
    """p, two-sided, of a Spearman correlation: all permutations up to seven teachers, RESAMPLES of them beyond."""
    test = scipy_stats().permutation_test(
        (mean_T,), lambda of, axis: _spearman(teacher_T, np.moveaxis(of, axis, -1)), permutation_type="pairings", vectorized=True,
        n_resamples=RESAMPLES, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(test.pvalue)


# The correlations of many resamples at once, which scipy computes one at a time. One whose students all tie shows no order: it counts as 0.


def _spearman(teacher_T: np.ndarray, student_RT: np.ndarray) -> np.ndarray:
    """(R,) Pearson's correlations of the ranks, where ties share their mean rank."""
    rank = scipy_stats().rankdata
    own_T, of_RT = rank(teacher_T), rank(student_RT, axis=-1)
    own_T, of_RT = own_T - own_T.mean(), of_RT - of_RT.mean(-1, keepdims=True)
    size = np.sqrt(np.square(own_T).sum() * np.square(of_RT).sum(-1))
    correlation: np.ndarray = np.divide((own_T * of_RT).sum(-1), size, out=np.zeros_like(size), where=size > 0)
    return correlation


def _signs(scores: np.ndarray) -> np.ndarray:
    """(..., P) for each pair of the last axis whether its second is the greater, 1, or the smaller, -1, or neither, 0."""
    first, second = np.triu_indices(scores.shape[-1], 1)
    signs: np.ndarray = np.sign(scores[..., second] - scores[..., first])
    return signs


def _kendall(teacher_T: np.ndarray, student_RT: np.ndarray) -> np.ndarray:
    """(R,) tau-b."""
    own_P, of_RP = _signs(teacher_T), _signs(student_RT)
    size = np.sqrt(np.abs(own_P).sum() * np.abs(of_RP).sum(-1))
    tau: np.ndarray = np.divide((own_P * of_RP).sum(-1), size, out=np.zeros_like(size), where=size > 0)
    return tau


def _slope(teacher_T: np.ndarray, student_RT: np.ndarray) -> np.ndarray:
    """(R,) slopes of lines of least squares."""
    own_T = teacher_T - teacher_T.mean()
    slope: np.ndarray = student_RT @ own_T / np.square(own_T).sum()
    return slope


def _wrong(teacher_T: np.ndarray, student_RT: np.ndarray) -> np.ndarray:
    """(R,) shares of the pairs in the wrong order, a tie as half a pair."""
    share: np.ndarray = (1 - (_signs(teacher_T) * _signs(student_RT)).mean(-1)) / 2
    return share
