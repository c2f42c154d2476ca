"""`dkd`: the KL divergence of softmaxes in its two parts, how sure of the match and how the rest is spread, each with a weight."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid

from megakd.objectives import cost
from megakd.objectives.lines import LineObjective, Lines
from megakd.recipe.objectives import Decoupled as Options

# Legend: c lines of a panel, N pairs of all ranks.


@final
class Decoupled(LineObjective):
    """t^2 / 2N * sum over rows and columns of alpha * KL(teacher's || student's [p, 1 - p]) + beta * KL of the softmaxes over the others,

    p the softmax of the line's own pair at temperature t, the others all pairs but that. Computed from log-probabilities: the authors'
    code takes the logarithm of a sum of probabilities, which is -inf where a student is sure, and blanks the own pair by subtracting 1000.
    A single pair has no others, and the loss is 0.
    Source: Decoupled Knowledge Distillation (arXiv 2203.08679), in which the target class stands where the own pair does here.
    """

    family = cost.DECOUPLED

    def compare(self, own: Lines, taught: Lines, options: Options, part: slice) -> Tensor:
        positives_c1 = own.positives(part)
        student, teacher = (_split(lines.logits(part, options.temperature), positives_c1) for lines in (own, taught))
        target_c, others_c = (
            kl_div(log_p, log_q, reduction="none", log_target=True).sum(1) for log_p, log_q in zip(student, teacher, strict=True)
        )
        return (options.alpha * target_c + options.beta * others_c) * options.temperature**2


def _split(logits_cN: Tensor, positives_c1: Tensor) -> tuple[Tensor, Tensor]:
    """(c, 2) log [p, 1 - p] of the own pair, and (c, N) log softmax of the others, in which the own pair's is the lowest number."""
    # not -inf, of which the difference between student and teacher would be nan
    others_cN = logits_cN.scatter(1, positives_c1, torch.finfo(logits_cN.dtype).min)
    odds_c1 = logits_cN.gather(1, positives_c1) - others_cN.logsumexp(1, keepdim=True)
    return torch.cat([logsigmoid(odds_c1), logsigmoid(-odds_c1)], 1), others_cN.log_softmax(1)
