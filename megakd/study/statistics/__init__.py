"""What a study's numbers say, with intervals: pure functions over scores, on scipy.

Scores come as {teacher: {seed: score}}, and each teacher's own as {teacher: score}. A score has to be finite; ValueError names one that is
not. Too little data is no error: a result without a value, or without an interval, says why in `reason`, and nothing is ever NaN.
"""

from megakd.study.statistics.estimate import Estimate
from megakd.study.statistics.gains import Equivalence, Gain, equivalence, holm, mean_gain, paired_gain
from megakd.study.statistics.ordering import FEWEST_TEACHERS, Order, correlation_difference, order
from megakd.study.statistics.prediction import Prediction, predictors

__all__ = [
    "FEWEST_TEACHERS",
    "Equivalence",
    "Estimate",
    "Gain",
    "Order",
    "Prediction",
    "correlation_difference",
    "equivalence",
    "holm",
    "mean_gain",
    "order",
    "paired_gain",
    "predictors",
]
