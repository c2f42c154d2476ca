"""Interactive contrastive learning: the student's rows against the frozen teacher's columns.

Legend: B local rows, N rows of all ranks, D width, M columns of a block, c rows of a panel, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import logsigmoid

from megakd_kernels.dispatch import choose
from megakd_kernels.distributed import Ranks, Sweep
from megakd_kernels.eager import gather
from megakd_kernels.one_pass import Gradients, differentiable, own_columns, panels_for
from megakd_kernels.one_pass_torch import Elementwise, half_gain
from megakd_kernels.panels import Logits, add_product
from megakd_kernels.precision import full_precision, product, run
from megakd_kernels.types import Facts, Pair, Towers, agree, compute_dtype, facts_of_pairs, wanted


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
    Returns a float32 scalar, float64 where an input is float64; logits, statistics and sums are kept in the same dtype,
    whatever the inputs' precision and whatever autocast says.

    Gradients flow to student.image, student.text and student.scale, each only where it requires one; the teacher gets none. They
    are accumulated in the forward pass, 4 N^2 D FLOPs a direction in all, and cost none where no input requires one.
    A second derivative (create_graph=True) raises RuntimeError, except with eager on one process. Deterministic: the same inputs
    give the same bits.

    group, and the scale of the gradients on several ranks: see `similarity_kd`.
    backend: "eager" (plain autograd, N x N logits), "compiled" (the same by torch.compile), "chunked" (panels of `chunk` rows, never
    N x N), "triton" (the same panels, with the work between the two products in one kernel; CUDA, not float64) or "auto"
    (`dispatch.TABLE`). chunk: None fills panels of `PANEL_BYTES` (`panels`, `triton.one_pass`). ring: the teacher's rows go around
    the ranks instead of being gathered; one pass as well, for chunked and triton.

    Raises ValueError for unequal widths, a chunk out of range, an unknown backend, and pairs of unequal shape; on several ranks a
    fault of one rank raises on all.
    Source: ICL of CLIP-KD (arXiv 2307.12732).
    """
    ranks = Ranks.of(group)

    def pick() -> str:
        dtype = compute_dtype(student.image, student.text, student.scale, teacher.text, teacher.image)
        pairs, device = len(student.image) * ranks.world, student.image.device
        return choose("interactive_kd", pairs, device, dtype, backend=backend, ring=ring, chunk=chunk)

    def examine() -> Facts:
        facts = facts_of_pairs(student, [teacher])
        if student.image.shape[1] != teacher.image.shape[1]:
            raise ValueError(
                f"student and teacher meet in one matrix and need one width, got {student.image.shape[1]} and {teacher.image.shape[1]}: "
                "project the student's embeddings to the teacher's width"
            )
        return {**facts, "ring": ring, "backend": pick()}

    agree(examine, ranks, student)
    own = Towers(student.image, student.text, student.scale.reshape(()))
    guide = _Columns(teacher.text.detach(), teacher.image.detach())
    dtype, device = compute_dtype(*own, *guide), own.image.device
    rows, columns = len(own.image), len(own.image) * ranks.world
    chosen = pick()
    with full_precision(device):
        if chosen in ("eager", "compiled"):
            return _eager(own, guide, ranks, dtype, compiled=chosen == "compiled")
        panels = panels_for(chosen, rows, rows if ring else columns, device, dtype, chunk)
        needs = wanted(*own)
        with torch.no_grad():
            loss, gradients = _pass(own, guide, Sweep(guide, ranks, ring=ring, share=None), panels, ranks, dtype, needs)
        return differentiable((loss,), (gradients,), own)[0]


class _Columns(NamedTuple):
    """(B, D) each, the frozen teacher's: what the student's images and its texts are compared with."""

    of_images: Tensor
    of_texts: Tensor


def _loss(logits: Iterable[Tensor]) -> Tensor:
    """logits: (N, N) of each direction's anchors, by its columns; each is let go before the next is formed."""
    by_image, by_text = map(_agreement, logits)
    return (by_image + by_text) / -2


def _agreement(logits_NN: Tensor) -> Tensor:
    return logits_NN.log_softmax(1).diagonal().mean()


def _loss_of_flat(*sides: Tensor) -> tuple[Tensor]:
    """Both directions' anchors, scaled, and columns, one after the other."""
    return (_loss([left_ND @ right_ND.T for left_ND, right_ND in zip(sides[::2], sides[1::2], strict=True)]),)


@cache
def _compiled_loss() -> Any:
    return torch.compile(_loss_of_flat, dynamic=False)


def _eager(student: Towers, teacher: _Columns, ranks: Ranks, dtype: torch.dtype, compiled: bool) -> Tensor:
    """By plain autograd. The scale goes into the local rows before the gather, so that it too gets its own rows' share."""
    sides = [
        (gather(left_BD.to(dtype) * student.scale.to(dtype), ranks), ranks.gather(right_BD).to(dtype))
        for left_BD, right_BD in zip((student.image, student.text), teacher, strict=True)
    ]
    if compiled:
        return run(_compiled_loss(), [tensor for side in sides for tensor in side])[0]
    return _loss(product(*side) for side in sides)


class _Anchors(NamedTuple):
    """One direction's rows, as far as the columns have come; updated in place.

    top_B, sum_B: largest logit, and sum of exp(logit - top), over all columns but the own pair's, whose logit is own_B.
    pulled_BD: sum of exp(logit - top) * column over the same; None where no gradient is wanted.
    """

    left_BD: Tensor
    top_B: Tensor
    sum_B: Tensor
    own_B: Tensor
    pulled_BD: Tensor | None

    @classmethod
    def of(cls, left_BD: Tensor, dtype: torch.dtype, want: bool) -> _Anchors:
        top_B = left_BD.new_full((len(left_BD),), torch.finfo(dtype).min, dtype=dtype)
        pulled_BD = torch.zeros_like(left_BD, dtype=dtype) if want else None
        return cls(left_BD, top_B, torch.zeros_like(top_B), torch.zeros_like(top_B), pulled_BD)

    def absorb(self, logits: Logits, diagonal: int | None, panels: Elementwise) -> None:
        """One product for the logits, one for the gradient. What was summed before fades as a larger logit turns up."""
        for rows, own_c, top_c, sum_c, weights_cM in panels.weigh(logits, diagonal, self.top_B, self.pulled_BD is not None):
            fade_c = (self.top_B[rows] - top_c).exp()
            self.sum_B[rows] = self.sum_B[rows] * fade_c + sum_c
            self.top_B[rows] = top_c
            if own_c is not None:
                self.own_B[rows] = own_c
            if self.pulled_BD is not None and weights_cM is not None:
                add_product(self.pulled_BD[rows].mul_(fade_c[:, None]), weights_cM, logits.right_ND)

    def finish(self, right_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum of -log softmax at the own pairs, and its gradient but for the scale, (B, D). right_BD: the own pairs' columns.

        -log p = softplus(lse of the others - own), and p - 1 = -q with q the sigmoid of that: no digit is lost where p is close to 1.
        """
        gap_B = self.top_B + self.sum_B.log() - self.own_B
        loss = -logsigmoid(-gap_B).sum()
        if self.pulled_BD is None:
            return loss, None
        weight_B = half_gain(self.left_BD.dtype) * self.sum_B.clamp_min(torch.finfo(gap_B.dtype).tiny)  # a row without others has sum 0
        return loss, (self.pulled_BD / weight_B[:, None]).sub_(right_BD).mul_(gap_B.sigmoid()[:, None])


def _pass(
    student: Towers, teacher: _Columns, sweep: Sweep, panels: Elementwise, ranks: Ranks, dtype: torch.dtype, needs: tuple[bool, ...]
) -> tuple[Tensor, Gradients]:
    """The loss over all ranks, and its gradients in image, text and scale, each where needed."""
    need_image, need_text, need_scale = needs
    rows, scale = len(student.image), student.scale.to(dtype)
    anchors = [
        _Anchors.of(left_BD, dtype, need or need_scale) for left_BD, need in ((student.image, need_image), (student.text, need_text))
    ]
    for block in sweep:
        diagonal = own_columns(block, ranks.rank * rows)
        for of, right_MD in zip(anchors, block.tensors, strict=True):
            of.absorb(Logits.of(of.left_BD, right_MD, scale), diagonal, panels)
    finished = [of.finish(right_BD) for of, right_BD in zip(anchors, teacher, strict=True)]
    loss = ranks.gather((finished[0][0] + finished[1][0])[None]).sum() / (2 * rows * ranks.world)
    # times world: the mean that data parallelism takes over ranks then gives the gradient of the global loss
    factor = 1 / (2 * rows)
    image_BD, text_BD = (slope_BD for _, slope_BD in finished)
    of_scale = None
    if need_scale and image_BD is not None and text_BD is not None:
        of_scale = ((image_BD * student.image).sum(1) + (text_BD * student.text).sum(1)).sum() * factor
    length = scale * factor
    image = image_BD * length if need_image and image_BD is not None else None
    text = text_BD * length if need_text and text_BD is not None else None
    return loss, (image, text, of_scale)
