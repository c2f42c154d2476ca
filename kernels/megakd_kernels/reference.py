"""The yardstick: the definitions written out in float64 for one process, by plain autograd. Slow, N x N, for tests only.

Legend: N pairs, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd_kernels.contract import Pair, SimilarityLoss


def _logits_NN(pair: Pair) -> Tensor:
    return pair.scale.double().reshape(()) * (pair.image.double() @ pair.text.double().T)


def _log_softmax(logits_NN: Tensor, dim: int) -> Tensor:
    return logits_NN - torch.logsumexp(logits_NN, dim, keepdim=True)


def similarity_kd_reference(student: Pair, teacher: Pair | None, *, temperature: float = 1.0, hard: bool = False) -> SimilarityLoss:
    """What `similarity_kd` computes, in float64 whatever the inputs' dtype; gradients flow to the inputs.

    Both pairs hold all N rows: several ranks are judged against one process that holds their concatenation.
    """
    zero = torch.zeros((), dtype=torch.float64, device=student.image.device)
    logits_NN = _logits_NN(student)
    kd = zero
    if teacher is not None:
        with torch.no_grad():
            soft_NN = _logits_NN(teacher) / temperature
        for dim in (1, 0):
            target_NN = _log_softmax(soft_NN, dim)
            kd = kd + (target_NN.exp() * (target_NN - _log_softmax(logits_NN / temperature, dim))).sum()
        kd = kd * (temperature**2 / (2 * len(logits_NN)))
    if not hard:
        return SimilarityLoss(kd, zero)
    by_row, by_column = (_log_softmax(logits_NN, dim).diagonal().mean() for dim in (1, 0))
    return SimilarityLoss(kd, (by_row + by_column) / -2)


def contrastive_reference(student: Pair) -> Tensor:
    """What `contrastive` computes, in float64."""
    return similarity_kd_reference(student, None, hard=True).hard
