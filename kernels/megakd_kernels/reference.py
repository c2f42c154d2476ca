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


def similarity_kd_reference(
    student: Pair,
    teacher: Pair | list[Pair] | None,
    *,
    temperature: float = 1.0,
    hard: bool = False,
    directions: tuple[float, float] = (0.5, 0.5),
) -> SimilarityLoss:
    """What `similarity_kd` computes, in float64 whatever the inputs' dtype; gradients flow to the inputs.

    Both pairs hold all N rows: several ranks are judged against one process that holds their concatenation.
    """
    zero = torch.zeros((), dtype=torch.float64, device=student.image.device)
    logits_NN, kd, infonce = _logits_NN(student), zero, zero
    teachers = teacher if isinstance(teacher, list) else [teacher] if teacher else []
    for guide in teachers:
        with torch.no_grad():
            soft_NN = _logits_NN(guide) / temperature
        for dim, weight in zip((1, 0), directions, strict=True):
            target_NN = _log_softmax(soft_NN, dim)
            divergence_N = (target_NN.exp() * (target_NN - _log_softmax(logits_NN / temperature, dim))).sum(dim)
            kd = kd + weight * temperature**2 / len(teachers) * divergence_N.mean()
    if hard:
        for dim, weight in zip((1, 0), directions, strict=True):
            infonce = infonce - weight * _log_softmax(logits_NN, dim).diagonal().mean()
    return SimilarityLoss(kd, infonce)


def contrastive_reference(student: Pair) -> Tensor:
    """What `contrastive` computes, in float64."""
    return similarity_kd_reference(student, None, hard=True).hard
