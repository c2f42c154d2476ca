"""What a decoder learns of a larger one: the divergence of the two distributions over the vocabulary, at each token of the answers.

With p = softmax(b / t) of the teacher's logits b, q = softmax(a / t) of the student's a, and m = (p + q) / 2, times t^2:

    forward   KL(p, q)                         Hinton et al., arXiv 1503.02531, which also has the factor t^2
    reverse   KL(q, p)                         MiniLLM, arXiv 2306.08543
    js        (KL(p, m) + KL(q, m)) / 2        GKD, arXiv 2306.13649, with beta = 1/2

The gradient at the logits falls with 1 / t^2 for all three at a high temperature, so that all three have the factor: the weight beside the
hard loss means the same at every temperature. TRL's GKDTrainer, which divides by a temperature too, has no such factor.

The sequences are the recipe's answers, not the student's own: what is generated on the fly is another method (GKD's lambda is 0 here).

Legend: N answer tokens of a micro-batch, W rows of the student's output layer, U of the teacher's, V words of the tokenizer that both
share: rows past it are padding and no words. n rows of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.recipe import AnswerTeacher
from megakd_kernels.panels import chunk_rows, chunks


@dataclass(frozen=True)
class TokenDivergence:
    """Compares a student's logits of some answer tokens with the teacher's.

    teacher_NU: the teacher's logits, of any floating type, without gradient. words: V, at most W and U.
    """

    settings: AnswerTeacher
    teacher_NU: Tensor
    words: int

    def __call__(self, student_NW: Tensor) -> Tensor:
        """(N,): the divergence at each token in nats, float32 or the student's wider type; differentiated in the student's logits.

        Beside its arguments it holds panels of some rows, and in the backward the gradient (N, W).
        """
        assert len(student_NW) == len(self.teacher_NU), "as many answer tokens of the teacher as of the student"
        found: Tensor = _Divergence.apply(student_NW, self.teacher_NU, self.words, self.settings.divergence, self.settings.temperature)
        return found


class _Divergence(torch.autograd.Function):
    """Loss and gradient are computed some rows at a time, so that nothing of N x V stays between the passes."""

    @staticmethod
    def forward(ctx: Any, student_NW: Tensor, teacher_NU: Tensor, words: int, kind: str, temperature: float) -> Tensor:
        ctx.save_for_backward(student_NW, teacher_NU)
        ctx.options = words, kind, temperature
        dtype = torch.promote_types(student_NW.dtype, torch.float32)
        loss_N = torch.empty(len(student_NW), dtype=dtype, device=student_NW.device)
        for rows in _panels(student_NW, words, dtype):
            log_q_nV, log_p_nV = (_log_softmax(logits[rows], words, temperature, dtype) for logits in (student_NW, teacher_NU))
            if kind == "forward":
                loss_n = _expected(log_p_nV, log_p_nV - log_q_nV)
            elif kind == "reverse":
                loss_n = _expected(log_q_nV, log_q_nV - log_p_nV)
            else:
                log_m_nV = _log_mean(log_p_nV, log_q_nV)
                loss_n = (_expected(log_p_nV, log_p_nV - log_m_nV) + _expected(log_q_nV, log_q_nV - log_m_nV)) / 2
            loss_N[rows] = temperature**2 * loss_n
        return loss_N

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        student_NW, teacher_NU = ctx.saved_tensors
        words, kind, temperature = ctx.options
        gradient_NW, dtype = torch.zeros_like(student_NW), gradient_N.dtype
        for rows in _panels(student_NW, words, dtype):
            log_q_nV, log_p_nV = (_log_softmax(logits[rows], words, temperature, dtype) for logits in (student_NW, teacher_NU))
            q_nV = log_q_nV.exp()
            if kind == "forward":
                own_nV = q_nV - log_p_nV.exp()
            else:
                # The derivative by q is this ratio and a constant, which the softmax's derivative takes out; for js the one by m is 0.
                ratio_nV = log_q_nV - (log_p_nV if kind == "reverse" else _log_mean(log_p_nV, log_q_nV))
                weighted_nV = torch.where(q_nV > 0, q_nV * ratio_nV, 0.0)
                own_nV = weighted_nV - q_nV * weighted_nV.sum(dim=1, keepdim=True)
                own_nV = own_nV if kind == "reverse" else own_nV / 2
            gradient_NW[rows, :words] = (own_nV * (temperature * gradient_N[rows, None])).to(gradient_NW.dtype)
        return gradient_NW, None, None, None, None


def _panels(student_NW: Tensor, words: int, dtype: torch.dtype) -> Iterator[slice]:
    return chunks(len(student_NW), chunk_rows(len(student_NW), words, dtype, student_NW.device))


def _log_softmax(logits_nW: Tensor, words: int, temperature: float, dtype: torch.dtype) -> Tensor:
    return (logits_nW[:, :words].to(dtype) / temperature).log_softmax(dim=1)


def _expected(log_weight_nV: Tensor, ratio_nV: Tensor) -> Tensor:
    """(n,): sum of weight * ratio. A word of no weight counts for 0, also where the ratio is infinite or NaN: logits may be -inf."""
    weight_nV = log_weight_nV.exp()
    return torch.where(weight_nV > 0, weight_nV * ratio_nV, 0.0).sum(dim=1)


def _log_mean(log_p_nV: Tensor, log_q_nV: Tensor) -> Tensor:
    """log((p + q) / 2), to the last bit log p where both are equal, which logaddexp is not."""
    high_nV, low_nV = torch.maximum(log_p_nV, log_q_nV), torch.minimum(log_p_nV, log_q_nV)
    return high_nV + torch.log1p(torch.expm1(low_nV - high_nV) / 2)
