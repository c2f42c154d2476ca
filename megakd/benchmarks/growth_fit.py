"""How a time grows with a number: an exponent with its interval, and the fixed, linear and quadratic parts of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megakd.runtime.extras import library

LEVEL = 0.95
Kind = Literal["flat", "linear"]
# |exponent| of what counts as flat: over four decades a step then costs at most 1.6 times as much. About 1 for linear.
FLAT, LINEAR = 0.05, 0.1


@dataclass(frozen=True)
class Power:
    """seconds ~ value ** exponent, least squares in the logarithms. low, high: the exponent's interval at LEVEL, by Student's t."""

    exponent: float
    low: float
    high: float
    factor: float  # the fitted seconds at value 1

    def at(self, value: float) -> float:
        return float(self.factor * value**self.exponent)

    def is_as(self, expected: Kind) -> bool:
        return abs(self.exponent) <= FLAT if expected == "flat" else abs(self.exponent - 1) <= LINEAR

    def __str__(self) -> str:
        return f"{self.exponent:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Parts:
    """seconds = fixed + linear * value + quadratic * value ** 2, none of them negative."""

    fixed: float
    linear: float
    quadratic: float

    @property
    def crossing(self) -> float:
        """The value at which the quadratic part costs as much as the linear one; infinity where there is none."""
        return self.linear / self.quadratic if self.quadratic else math.inf

    def quadratic_share(self, value: float) -> float:
        whole = self.fixed + self.linear * value + self.quadratic * value**2
        return self.quadratic * value**2 / whole


def power(values: Sequence[float], seconds: Sequence[float]) -> Power:
    """values, seconds: one pair a measurement, several of one value where it was measured several times.

    The interval is infinite where two measurements leave nothing to judge a line by. Raises ValueError for fewer than two values.
    """
    if len(set(values)) < 2:
        raise ValueError(f"an exponent needs two values at least, given {sorted(set(values))}")
    stats = _scipy("stats")
    line = stats.linregress(np.log(values), np.log(seconds))
    freedom = len(values) - 2
    error = float(line.stderr) if len(set(seconds)) > 1 else 0.0  # of a constant scipy has none
    slope, half = float(line.slope), float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error if freedom else math.inf
    return Power(slope, slope - half, slope + half, math.exp(line.intercept))


def parts(values: Sequence[float], seconds: Sequence[float]) -> Parts:
    """By non-negative least squares of relative errors: a small batch counts as much as a large one."""
    value_N, weight_N = np.asarray(values, float), 1 / np.asarray(seconds, float)
    largest = value_N.max()  # columns of one size
    columns_N3 = np.stack([np.ones_like(value_N), value_N / largest, (value_N / largest) ** 2], axis=1)
    (fixed, linear, quadratic), _ = _scipy("optimize").nnls(columns_N3 * weight_N[:, None], np.ones_like(value_N))
    return Parts(float(fixed), float(linear / largest), float(quadratic / largest**2))


def _scipy(part: str) -> Any:
    return library(f"scipy.{part}", "megakd bench growth needs", "study", "scipy")
