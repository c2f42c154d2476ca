"""Interactive contrastive learning: the student's rows against the frozen teacher's columns.

Legend: B rows of this rank, N rows of all ranks, D width, M columns of a block, c rows of a panel, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import logsigmoid

from megakd_kernels.dispatch import choose, one_pass_kernels
from megakd_kernels.distributed import Facts, Ranks, Sweep, agree, gather_rows
from megakd_kernels.one_pass import Gradients, OnePassKernels, differentiable, half_gain
from megakd_kernels.panels import Logits, add_product
from megakd_kernels.precision import full_precision, product, run_compiled
from megakd_kernels.types import CheckedPair, Pair, check_pairs, compute_dtype, device_of, needs_grad


def interactive_kd(
    student: Pair,
    teacher: Pair,
    *,
    group: ProcessGroup | None = None,
    backend: str = "auto",
    chunk: int | None = None,
    ring: bool = False,
) -> Tensor:
    """InfoNCE of the student's images against the teacher's texts, and of the student's texts against the teacher's images; their mean.

    L = 1 / (2 N) * sum_i [ lse_j s <S_image_i, T_text_j> - s <S_image_i, T_text_i> + the same with image and text exchanged ],
    s = student.scale, N the pairs of all ranks. The softmax runs over the teacher's columns only: each anchor is the student's.

    student, teacher: image (B, D), text (B, D), scale () or (1,), floating point. Both widths must be equal: project the student
    first. teacher.scale is checked like any other and otherwise unused.
    Returns a scalar. Its dtype, the precision inside, which tensors get gradients, their scale on several ranks, second derivatives,
    determinism and group: as of `similarity_kd`. Gradients are accumulated in the forward pass, 4 N^2 D FLOPs a direction in all, and
    cost none where no input requires one.

    backend: "eager" (plain autograd, N x N logits), "compiled" (the same by torch.compile), "chunked" (panels of `chunk` rows, never
    N x N), "triton" (the same panels, with the work between the two products in one kernel; CUDA, not float64) or "auto"
    (`dispatch.TABLE`). chunk: None fills panels of `PANEL_BYTES` (`panels`, `triton.one_pass`). ring: the teacher's rows go around
    the ranks instead of being gathered; one pass as well, for chunked and triton.

    Raises ValueError for unequal widths, a chunk out of range, an unknown backend, and pairs of unequal shape; on several ranks a
    fault of one rank raises on all.
    Source: ICL of CLIP-KD (arXiv 2307.12732).
    """
    ranks = Ranks.of(group)

    def check() -> Facts:
        facts = check_pairs(student, [teacher])
        if student.image.shape[1] != teacher.image.shape[1]:
            raise ValueError(
                f"student and teacher meet in one matrix and need one width, got {student.image.shape[1]} and {teacher.image.shape[1]}: "
                "project the student's embeddings to the teacher's width"
            )
        dtype = compute_dtype(student.image, student.text, student.scale, teacher.text, teacher.image)
        pairs = len(student.image) * ranks.world
        chosen = choose("interactive_kd", pairs, student.image.device, dtype, backend=backend, ring=ring, chunk=chunk)
        return {**facts, "ring": ring, "backend": chosen}

    chosen = agree(check, ranks, device_of(student))["backend"]
    checked = CheckedPair(student.image, student.text, student.scale.reshape(()))
    columns = _TeacherColumns(teacher.text.detach(), teacher.image.detach())
    dtype, device = compute_dtype(*checked, *columns), checked.image.device
    rows = len(checked.image)
    with full_precision(device):
        if chosen in ("eager", "compiled"):
            return _eager(checked, columns, ranks, dtype, compiled=chosen == "compiled")
        kernels = one_pass_kernels(chosen, rows, rows if ring else rows * ranks.world, device, dtype, chunk)
        needs = needs_grad(*checked)
        with torch.no_grad():
            loss, gradients = _one_pass(checked, columns, Sweep(columns, ranks, ring=ring, grad_like=None), kernels, ranks, dtype, needs)
        return differentiable((loss,), (gradients,), checked)[0]


class _TeacherColumns(NamedTuple):
    """(B, D) each: the frozen teacher's embeddings that the student's images and its texts are compared with."""

    for_images: Tensor
    for_texts: Tensor


def _loss(logits: Iterable[Tensor]) -> Tensor:
    """logits: (N, N) of each direction, student rows by teacher columns; each is freed before the next is formed."""
    image_log_p, text_log_p = (logits_NN.log_softmax(1).diagonal().mean() for logits_NN in logits)
    return (image_log_p + text_log_p) / -2


def _loss_of_factors(*factors: Tensor) -> tuple[Tensor]:
    """factors: scaled rows and columns of both directions, one after the other."""
    return (_loss([left_ND @ right_ND.T for left_ND, right_ND in zip(factors[::2], factors[1::2], strict=True)]),)


def _eager(student: CheckedPair, teacher: _TeacherColumns, ranks: Ranks, dtype: torch.dtype, compiled: bool) -> Tensor:
    """By plain autograd. The scale multiplies the local rows before the gather, so its gradient too is of the own rows."""
    factors = [
        (gather_rows(left_BD.to(dtype) * student.scale.to(dtype), ranks), ranks.gather(right_BD).to(dtype))
        for left_BD, right_BD in zip((student.image, student.text), teacher, strict=True)
    ]
    if compiled:
        return run_compiled(_loss_of_factors, [tensor for pair in factors for tensor in pair])[0]
    return _loss(product(*pair) for pair in factors)


class _Rows(NamedTuple):
    """One direction's rows, over the columns seen so far; updated in place.

    m_B, l_B: largest logit, and sum of exp(logit - m), over all columns but the positive's, whose logit is positive_B.
    weighted_sum_BD: sum of exp(logit - m) * column over the same; None where no gradient is needed.
    """

    left_BD: Tensor
    m_B: Tensor
    l_B: Tensor
    positive_B: Tensor
    weighted_sum_BD: Tensor | None

    @classmethod
    def of(cls, left_BD: Tensor, dtype: torch.dtype, need: bool) -> _Rows:
        m_B = left_BD.new_full((len(left_BD),), torch.finfo(dtype).min, dtype=dtype)
        weighted_sum_BD = torch.zeros_like(left_BD, dtype=dtype) if need else None
        return cls(left_BD, m_B, torch.zeros_like(m_B), torch.zeros_like(m_B), weighted_sum_BD)

    def add(self, logits: Logits, diagonal: int | None, kernels: OnePassKernels) -> None:
        """Adds a block of columns: one product for the logits, one for the gradient."""
        for rows, positive_c, m_c, l_c, exp_cM in kernels.exp_panels(logits, diagonal, self.m_B, self.weighted_sum_BD is not None):
            alpha_c = (self.m_B[rows] - m_c).exp()
            self.l_B[rows] = self.l_B[rows] * alpha_c + l_c
            self.m_B[rows] = m_c
            if positive_c is not None:
                self.positive_B[rows] = positive_c
            if self.weighted_sum_BD is not None and exp_cM is not None:
                add_product(self.weighted_sum_BD[rows].mul_(alpha_c[:, None]), exp_cM, logits.right_ND)

    def finish(self, positives_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum of -log softmax at the positives, and its gradient but for the scale, (B, D). positives_BD: the positives' columns.

        With delta = logsumexp of the negatives - positive, -log p = softplus(delta), and p - 1 = -sigmoid(delta): no digit is lost where p
        is close to 1.
        """
        delta_B = self.m_B + self.l_B.log() - self.positive_B
        loss = -logsigmoid(-delta_B).sum()
        if self.weighted_sum_BD is None:
            return loss, None
        divisor_B = half_gain(self.left_BD.dtype) * self.l_B.clamp_min(torch.finfo(delta_B.dtype).tiny)  # l is 0 without negatives
        return loss, (self.weighted_sum_BD / divisor_B[:, None]).sub_(positives_BD).mul_(delta_B.sigmoid()[:, None])


def _one_pass(
    student: CheckedPair,
    teacher: _TeacherColumns,
    sweep: Sweep,
    kernels: OnePassKernels,
    ranks: Ranks,
    dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Gradients]:
    """The loss over all ranks, and its gradients in image, text and scale, each where needed."""
    need_image, need_text, need_scale = needs
    count, scale = len(student.image), student.scale.to(dtype)
    directions = [
        _Rows.of(left_BD, dtype, need or need_scale) for left_BD, need in ((student.image, need_image), (student.text, need_text))
    ]
    for block in sweep:
        diagonal = block.diagonal(ranks.rank * count)
        for rows, right_MD in zip(directions, block.tensors, strict=True):
            rows.add(Logits.of(rows.left_BD, right_MD, scale), diagonal, kernels)
    (image_loss, image_BD), (text_loss, text_BD) = (rows.finish(right_BD) for rows, right_BD in zip(directions, teacher, strict=True))
    loss = ranks.gather((image_loss + text_loss)[None]).sum() / (2 * count * ranks.world)
    # times world: the mean that data parallelism takes over ranks then gives the gradient of the global loss
    factor = 1 / (2 * count)
    scale_grad = None
    if need_scale and image_BD is not None and text_BD is not None:
        scale_grad = ((image_BD * student.image).sum(1) + (text_BD * student.text).sum(1)).sum() * factor
    scaled = scale * factor
    image_grad = image_BD * scaled if need_image and image_BD is not None else None
    text_grad = text_BD * scaled if need_text and text_BD is not None else None
    return loss, (image_grad, text_grad, scale_grad)
