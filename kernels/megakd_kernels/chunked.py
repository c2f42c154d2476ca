"""The similarity losses by row chunks: O(N (D + c)) memory, deterministic, on any device.

The forward pass forms each (c, N) panel of student and teacher logits once, finishes the statistics of its rows and adds its
share to those of the columns. The backward pass forms each panel once more, turns it into the slope of the loss (softmax
differences) and multiplies it with the embeddings at once. Several ranks: rank r does so for its own B rows by all N columns.

Legend: B local rows, N columns (rows of all ranks), D width, c rows of a chunk, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd_kernels.contract import SimilarityLoss, Towers, compute_dtype
from megakd_kernels.normalisers import Normalisers, join, merge, merge_over_ranks, summarise
from megakd_kernels.panels import Logits, add_product, chunks, spare_panels
from megakd_kernels.ranks import Ranks

# The slope panel is cast to half precision where the product takes halves. Its entries are at most 8, mostly near 1 / N:
# this gain keeps them inside float16 (8 * 2^12 < 65504, and 2^-24 / 2^12 is far below 1 / N). Exact in every other dtype.
SLOPE_GAIN = 2.0**12


class _Plan(NamedTuple):
    """What is asked for, all of it known on the host."""

    temperature: float
    hard: bool
    chunk: int
    ranks: Ranks

    @property
    def sharpen(self) -> float | None:
        """Set where the hard part needs a normaliser of its own: at temperature 1 it is the student's softmax of the KD part."""
        return self.temperature if self.hard and self.temperature != 1 else None


class _Matrices(NamedTuple):
    """This rank's stripe of student and teacher logits over the temperature."""

    student: Logits
    teacher: Logits | None

    @classmethod
    def of(cls, student: Towers, teacher: Towers | None, dtype: torch.dtype, temperature: float) -> _Matrices:
        """student.text and teacher.text hold the rows of all ranks."""

        def logits(towers: Towers) -> Logits:
            return Logits.of(towers.image, towers.text, towers.scale.to(dtype) / temperature)

        return cls(logits(student), None if teacher is None else logits(teacher))

    def panels(self, wanted: slice, out: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Both logits of some rows, in the last two panels of `out`."""
        return self.student.rows(wanted, out[-1]), None if self.teacher is None else self.teacher.rows(wanted, out[-2])


def _statistics(matrices: _Matrices, plan: _Plan) -> tuple[Normalisers, Normalisers, Tensor]:
    """Statistics of the own rows, of all columns over the rows of all ranks, and the own diagonal of the student's logits."""
    rows: list[Normalisers] = []
    diagonal: list[Tensor] = []
    columns: Normalisers | None = None
    own_rows = matrices.student.left_BD.shape[0]
    spare = spare_panels(3 if matrices.teacher is None else 5, plan.chunk, matrices.student)
    for wanted in chunks(own_rows, plan.chunk):
        a_cN, b_cN = matrices.panels(wanted, spare)
        rows.append(summarise(a_cN, b_cN, 1, plan.sharpen, spare))
        share = summarise(a_cN, b_cN, 0, plan.sharpen, spare)
        columns = share if columns is None else merge(columns, share, plan.sharpen)
        diagonal.append(a_cN.diagonal(plan.ranks.rank * own_rows + wanted.start).clone())
    assert columns is not None
    return join(rows), merge_over_ranks(columns, plan.ranks, plan.sharpen), torch.cat(diagonal)


def _losses(rows: Normalisers, columns: Normalisers, diagonal_B: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """KD and InfoNCE. Each rank sums its own rows and the columns of its own texts; the sums are added in rank order."""
    first = plan.ranks.rank * len(diagonal_B)
    own = (rows, columns.lines(slice(first, first + len(diagonal_B))))
    kd = hard = diagonal_B.new_zeros(())
    if rows.gap is not None:
        kd = (own[0].divergence().sum() + own[1].divergence().sum()) * plan.temperature**2
    if plan.hard:
        hard = own[0].infonce(diagonal_B, plan.sharpen).sum() + own[1].infonce(diagonal_B, plan.sharpen).sum()
    sums_W2 = plan.ranks.gather(torch.stack([kd, hard])[None]) / (2 * len(columns.max_a))
    return sums_W2[:, 0].sum(), sums_W2[:, 1].sum()


def _add_softmax(slope_cN: Tensor, logits_cN: Tensor, top: Tensor, weight: Tensor, sharpen: float, spare_cN: Tensor) -> None:
    """slope += weight * exp(sharpen * (logits - top))"""
    below_cN = torch.sub(logits_cN, top, out=spare_cN)
    if sharpen != 1:
        below_cN.mul_(sharpen)
    slope_cN.addcmul_(below_cN.exp_(), weight)


class _Pull(NamedTuple):
    """Upstream gradients as weights of the softmaxes in the slope, at most 1 in size each, and the unit taken out of them."""

    kd: Tensor
    hard: Tensor
    unit: Tensor

    @classmethod
    def of(cls, grad_kd: Tensor, grad_hard: Tensor, temperature: float) -> _Pull:
        kd = grad_kd * temperature
        unit = torch.maximum(kd.abs(), grad_hard.abs()).clamp_min(torch.finfo(kd.dtype).tiny)
        return cls(kd / unit, grad_hard / unit, unit)


def _slope(
    logits: tuple[Tensor, Tensor | None],
    sides: tuple[Normalisers, Normalisers],
    pull: _Pull,
    sharpen: float | None,
    spare: Sequence[Tensor],
) -> Tensor:
    """d loss / d (scale * cosine) of one panel without its diagonal term, times 2N / pull.unit; in the first of two spare panels.

    logits: student's and teacher's. sides: the statistics of the panel's rows, and of all columns.
    """
    a_cN, b_cN = logits
    slope_cN, work_cN = (panel[: len(a_cN)] for panel in spare[:2])
    slope_cN.zero_()
    soft = pull.kd if sharpen is not None else pull.kd + pull.hard
    for lines, dim in zip(sides, (1, 0), strict=True):
        top_a = lines.max_a.unsqueeze(dim)
        _add_softmax(slope_cN, a_cN, top_a, (soft / lines.sum_a).unsqueeze(dim), 1.0, work_cN)
        if lines.sum_hard is not None and sharpen is not None:
            _add_softmax(slope_cN, a_cN, top_a, (pull.hard / lines.sum_hard).unsqueeze(dim), sharpen, work_cN)
        if b_cN is not None and lines.max_b is not None and lines.sum_b is not None:
            _add_softmax(slope_cN, b_cN, lines.max_b.unsqueeze(dim), (-pull.kd / lines.sum_b).unsqueeze(dim), 1.0, work_cN)
    return slope_cN


class _Gradients(NamedTuple):
    """None where not wanted. All of them lack the factor unit / 2N * W that the caller knows; the embeddings also lack the scale."""

    image_BD: Tensor | None
    text_ND: Tensor | None
    scale: Tensor | None


def _gradients(
    matrices: _Matrices,
    rows: Normalisers,
    columns: Normalisers,
    pull: _Pull,
    plan: _Plan,
    wants: tuple[bool, ...],
) -> _Gradients:
    """wants: whether the gradients of image, text and scale are needed."""
    left_BD, right_ND, gain = matrices.student
    want_image, want_text, want_scale = wants
    image_BD = torch.empty_like(left_BD, dtype=gain.dtype) if want_image else None
    text_ND = torch.zeros_like(right_ND, dtype=gain.dtype) if want_text else None
    shares: list[Tensor] = []
    spare = spare_panels(3 if matrices.teacher is None else 4, plan.chunk, matrices.student)
    for wanted in chunks(left_BD.shape[0], plan.chunk):
        slope_cN = _slope(matrices.panels(wanted, spare), (rows.lines(wanted), columns), pull, plan.sharpen, spare)
        slope_cN.diagonal(plan.ranks.rank * left_BD.shape[0] + wanted.start).sub_(2 * pull.hard)
        slope_cN = slope_cN.mul_(SLOPE_GAIN).to(right_ND.dtype)
        left_cD = left_BD[wanted]
        if want_image or want_scale:
            pulled_cD = torch.zeros_like(left_cD, dtype=gain.dtype)
            add_product(pulled_cD, slope_cN, right_ND)
            shares.append((pulled_cD * left_cD).sum())
            if image_BD is not None:
                image_BD[wanted] = pulled_cD
        if text_ND is not None:
            add_product(text_ND, slope_cN.T, left_cD)
    return _Gradients(image_BD, text_ND, torch.stack(shares).sum() if want_scale else None)


class _SimilarityLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, teacher: Towers | None, plan: _Plan) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.dtype = plan, compute_dtype(image, text, scale, *(teacher or ()))
        student = Towers(image, plan.ranks.gather(text), scale)
        if teacher is not None:
            teacher = teacher._replace(text=plan.ranks.gather(teacher.text))
        rows, columns, diagonal_B = _statistics(_Matrices.of(student, teacher, ctx.dtype, plan.temperature), plan)
        ctx.save_for_backward(*student, *(teacher or (None, None, None)), *rows, *columns)
        kd, hard = _losses(rows, columns, diagonal_B, plan)
        ctx.mark_non_differentiable(*(() if teacher else (kd,)), *(() if plan.hard else (hard,)))
        return kd, hard

    @staticmethod
    def backward(ctx: Any, grad_kd: Tensor, grad_hard: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` raises only where the upstream gradient carries a graph; after a plain loss it would drop the term.
        if torch.is_grad_enabled():
            raise RuntimeError("the chunked backend has no second derivative (create_graph=True): use backend='eager' on one process")
        plan: _Plan = ctx.plan
        saved = ctx.saved_tensors
        student, rows, columns = Towers(*saved[:3]), Normalisers(*saved[6:12]), Normalisers(*saved[12:])
        teacher = None if saved[3] is None else Towers(*saved[3:6])
        with torch.autocast(student.image.device.type, enabled=False):
            matrices = _Matrices.of(student, teacher, ctx.dtype, plan.temperature)
            pull = _Pull.of(grad_kd, grad_hard, plan.temperature)
            image_BD, text_ND, own_scale = _gradients(matrices, rows, columns, pull, plan, ctx.needs_input_grad[:3])
            # times W: the mean that data parallelism takes over ranks then gives the gradient of the global loss
            factor = pull.unit * (plan.ranks.world / (2 * len(columns.max_a) * SLOPE_GAIN))
            length = factor * student.scale.to(ctx.dtype)
            image = None if image_BD is None else image_BD.mul_(length).to(student.image.dtype)
            text = None if text_ND is None else plan.ranks.sum_to_owner(text_ND.mul_(length)).to(student.text.dtype)
            scale = None if own_scale is None else (own_scale * factor).to(student.scale.dtype)
        return image, text, scale, None, None


def chunked(student: Towers, teacher: Towers | None, temperature: float, hard: bool, ranks: Ranks, chunk: int) -> SimilarityLoss:
    """See `similarity_kd`. chunk: rows of logits held at a time."""
    plan = _Plan(1.0 if teacher is None else temperature, hard, chunk, ranks)
    return SimilarityLoss(*_SimilarityLoss.apply(*student, teacher, plan))
