"""`standardised`: KL divergence of the softmaxes of z-scores, to which the two models' logit scales do not matter."""

from __future__ import annotations

import math
from typing import final

from torch import Tensor
from torch.nn.functional import kl_div

from megakd.objectives import cost
from megakd.objectives.lines import LineObjective, Lines, unit_about_mean
from megakd.recipe.objectives import Standardised as Options

# Legend: c lines of a panel, N pairs of all ranks.


@final
class Standardised(LineObjective):
    """t^2 / 2N * sum over rows and columns of KL(softmax(z(b) / t) || softmax(z(a) / t)), z(x) = (x - mean) / standard deviation.

    Mean and deviation are those of a line's N numbers; the deviation's square is over N, where the authors' code has N - 1. A z-score
    is the same at every logit scale, so this reads cosines, and the scale gets no gradient. A line of equal numbers, such as that of a
    single pair, has z-scores of 0 and no gradient.
    Source: Logit Standardization in Knowledge Distillation (arXiv 2403.01427).
    """

    family = cost.STANDARDISED

    def compare(self, own: Lines, taught: Lines, options: Options, part: slice) -> Tensor:
        log_p_cN, log_q_cN = (_z_scores(lines.cosines(part)).div(options.temperature).log_softmax(1) for lines in (own, taught))
        divergence_c: Tensor = kl_div(log_p_cN, log_q_cN, reduction="none", log_target=True).sum(1)
        return divergence_c * options.temperature**2


def _z_scores(values_cN: Tensor) -> Tensor:
    return unit_about_mean(values_cN) * math.sqrt(values_cN.shape[1])
