"""The definitions of the losses in float64, N x N, for one process, by plain autograd. Tests judge every backend by them.

Legend: N pairs, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from megakd_kernels.types import BiasedPair, Pair, SimilarityLoss


def _logits_NN(left_ND: Tensor, right_ND: Tensor, scale: Tensor) -> Tensor:
    return scale.double().reshape(()) * (left_ND.double() @ right_ND.double().T)


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

    Both pairs hold all N rows: several ranks are compared with one process that holds their concatenation.
    """
    zero = torch.zeros((), dtype=torch.float64, device=student.image.device)
    logits_NN, kd, infonce = _logits_NN(student.image, student.text, student.scale), zero, zero
    teachers = teacher if isinstance(teacher, list) else [teacher] if teacher else []
    for each in teachers:
        with torch.no_grad():
            teacher_NN = _logits_NN(each.image, each.text, each.scale) / temperature
        for dim, weight in zip((1, 0), directions, strict=True):
            target_NN = _log_softmax(teacher_NN, dim)
            divergence_N = (target_NN.exp() * (target_NN - _log_softmax(logits_NN / temperature, dim))).sum(dim)
            kd = kd + weight * temperature**2 / len(teachers) * divergence_N.mean()
    if hard:
        for dim, weight in zip((1, 0), directions, strict=True):
            infonce = infonce - weight * _log_softmax(logits_NN, dim).diagonal().mean()
    return SimilarityLoss(kd, infonce)


def contrastive_reference(student: Pair) -> Tensor:
    """What `contrastive` computes, in float64."""
    return similarity_kd_reference(student, None, hard=True).hard


def interactive_kd_reference(student: Pair, teacher: Pair) -> Tensor:
    """What `interactive_kd` computes, in float64 whatever the inputs' dtype; gradients flow to the student's tensors."""
    by_image = _logits_NN(student.image, teacher.text.detach(), student.scale)
    by_text = _logits_NN(student.text, teacher.image.detach(), student.scale)
    return sum((logits.logsumexp(1) - logits.diagonal()).mean() / 2 for logits in (by_image, by_text))  # type: ignore[return-value]


def _biased_NN(pair: BiasedPair) -> Tensor:
    logits_NN = _logits_NN(pair.image, pair.text, pair.scale)
    return logits_NN if pair.bias is None else logits_NN + pair.bias.double().reshape(())


def sigmoid_kd_reference(student: BiasedPair, teachers: Sequence[BiasedPair], *, hard: bool = False) -> SimilarityLoss:
    """What `sigmoid_kd` computes, in float64; gradients flow to the student's tensors. `teachers` is a list, empty for none."""
    logits_NN = _biased_NN(student)
    kd = siglip = torch.zeros((), dtype=torch.float64, device=student.image.device)
    for teacher in teachers:
        with torch.no_grad():
            target_NN = _biased_NN(teacher)
            entropy = binary_cross_entropy_with_logits(target_NN, target_NN.sigmoid(), reduction="sum")
        cross = binary_cross_entropy_with_logits(logits_NN, target_NN.sigmoid(), reduction="sum")
        kd = kd + (cross - entropy) / (len(logits_NN) * len(teachers))
    if hard:
        sign_NN = 2 * torch.eye(len(logits_NN), dtype=torch.float64, device=logits_NN.device) - 1
        siglip = -logsigmoid(sign_NN * logits_NN).sum() / len(logits_NN)
    return SimilarityLoss(kd, siglip)
