"""A number with its interval, and what all statistics of a study begin with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megakd.runtime.extras import library

LEVEL = 0.95  # of every interval, but for that of an equivalence


@dataclass(frozen=True)
class Estimate:
    """A number, its interval from `low` to `high`, and of how many observations it is. p: of "there is no effect", two-sided.

    value, low, high and p are None where there is too little data for them, and `reason` says what is missing.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None = None
    reason: str = ""


def scipy_stats() -> Any:
    """scipy.stats. Raises ValueError, naming the extra that brings it, where scipy is not installed."""
    return library("scipy.stats", "the statistics of a study need", "study")


def checked(scores: Mapping[Any, float], what: str) -> None:
    """Raises ValueError, naming it, for a score that is not finite."""
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"{what} {name} is {score}: only finite scores can be compared; leave it out")


def all_alike(values: Iterable[float]) -> bool:
    """Whether values differ by rounding alone. True for none and for one."""
    known = list(values)
    return not known or max(known) - min(known) <= 1e-12 * max(map(abs, known))
