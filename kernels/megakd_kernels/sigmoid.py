"""Distillation between models trained with SigLIP's loss: every pair of the batch is a yes-or-no question of its own.

Legend: B local rows, N rows of all ranks, D width, M columns of a block, c rows of a panel, K teachers, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import logsigmoid

from megakd_kernels.dispatch import choose
from megakd_kernels.distributed import Block, Ranks, Sweep
from megakd_kernels.eager import gather
from megakd_kernels.one_pass import Gradients, differentiable, own_columns, panels_for
from megakd_kernels.one_pass_torch import Biased, Elementwise, Part, half_gain
from megakd_kernels.panels import Logits, add_product
from megakd_kernels.precision import full_precision, product, run
from megakd_kernels.types import Facts, Pair, SimilarityLoss, agree, compute_dtype, facts_of_pairs, wanted


class BiasedPair(Pair, Protocol):
    """A `Pair` whose logits also carry a bias, as SigLIP's do."""

    @property
    def bias(self) -> Tensor | None:
        """() or (1,), added to scale * cosine; None counts as 0."""


def sigmoid_kd(
    student: BiasedPair,
    teacher: BiasedPair | list[BiasedPair] | None,
    *,
    hard: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "auto",
    chunk: int | None = None,
    ring: bool = False,
) -> SimilarityLoss:
    """Divergence of the teacher's yes-or-no answer about each pair from the student's; with `hard` also SigLIP's own loss.

    a = student.scale * student.image @ student.text.T + student.bias, (N, N), N the pairs of all ranks; b_k likewise of teacher k.
    kd   = 1 / N * sum over m, n of the mean over k of KL(Bernoulli(sigmoid(b_k)) || Bernoulli(sigmoid(a))):
           the cross-entropy against soft targets less the teachers' own entropy, so its gradient is (sigmoid(a) - mean sigmoid(b_k)) / N.
    hard = 1 / N * sum over m, n of softplus(-z a), z = 1 where m = n and -1 elsewhere.
    The weights of the two in a total are the caller's.

    student, each teacher: image (B, D), text (B, D), scale () or (1,), bias likewise or None, floating point; widths D, scales and
    biases are each model's own. Several teachers come as a list (a tuple may be one model's embeddings). Without a teacher kd is 0;
    a part that was not asked for is 0 without a gradient. Where every teacher and the student hold the same numbers kd is exactly 0.
    Returns float32 scalars, float64 where an input is float64; logits and sums are kept in the same dtype, whatever the inputs'
    precision and whatever autocast says. Each term is exact to a few roundings of its largest logit, of any size.

    Gradients flow to student.image, text, scale and bias, each only where it requires one; the teachers get none. They are
    accumulated in the forward pass: 6 D + 2 sum D_k FLOPs times N^2 for one part, 10 D + 2 sum D_k for both, and 4 N^2 D less for
    each where no input requires one. A second derivative (create_graph=True) raises RuntimeError, except with eager on one
    process. Deterministic: the same inputs give the same bits.

    group, and the scale of the gradients on several ranks: see `similarity_kd`; the bias is treated as the scale is.
    backend, chunk, ring: see `interactive_kd`; the ring takes the texts of student and teachers around, and the gradients back.

    Raises ValueError for a chunk out of range, an unknown backend, an empty list of teachers, and pairs of unequal shape; on
    several ranks a fault of one rank raises on all.
    Source: SigLIP (arXiv 2303.15343).
    """
    ranks = Ranks.of(group)
    teachers = [] if teacher is None else teacher if isinstance(teacher, list) else [teacher]

    def pick() -> str:
        numbers = [
            tensor for pair in (student, *teachers) for tensor in (pair.image, pair.text, pair.scale, pair.bias) if tensor is not None
        ]
        pairs, device = len(student.image) * ranks.world, student.image.device
        return choose("sigmoid_kd", pairs, device, compute_dtype(*numbers), backend=backend, ring=ring, chunk=chunk)

    def examine() -> Facts:
        if isinstance(teacher, list) and not teacher:
            raise ValueError("the list of teachers is empty: pass None for no teacher")
        facts = {**facts_of_pairs(student, teachers), **_facts_of_biases(student, teachers)}
        return {**facts, "hard": hard, "ring": ring, "backend": pick()}

    agree(examine, ranks, student)
    own = _BiasedTowers.of(student)
    guides = [_BiasedTowers(*(tensor.detach() for tensor in _BiasedTowers.of(each))) for each in teachers]
    dtype, device = compute_dtype(*own, *(tensor for guide in guides for tensor in guide)), own.image.device
    rows, columns = len(own.image), len(own.image) * ranks.world
    chosen = pick()
    with full_precision(device):
        if chosen in ("eager", "compiled"):
            return _eager(own, guides, hard, ranks, dtype, compiled=chosen == "compiled")
        panels = panels_for(chosen, rows, rows if ring else columns, device, dtype, chunk)
        zero = torch.zeros((), dtype=dtype, device=device)
        if not guides and not hard:
            return SimilarityLoss(zero, zero)
        needs = wanted(*own)
        with torch.no_grad():
            found = _Pass(own, guides, hard, ranks, dtype, needs).run(panels, ring)
        losses = list(differentiable(*found, own))
        return SimilarityLoss(losses.pop(0) if guides else zero, losses.pop() if hard else zero)


class _BiasedTowers(NamedTuple):
    """A `BiasedPair` past the door; scale and bias of shape ()."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def of(cls, pair: BiasedPair) -> _BiasedTowers:
        bias = torch.zeros_like(pair.scale, requires_grad=False) if pair.bias is None else pair.bias
        return cls(pair.image, pair.text, pair.scale.reshape(()), bias.reshape(()))


def _facts_of_biases(student: BiasedPair, teachers: Sequence[BiasedPair]) -> Facts:
    """Raises ValueError for a bias that is no number; what all ranks must have alike of them."""
    for name, pair in (("student", student), *(("teacher", each) for each in teachers)):
        if pair.bias is not None and not (pair.bias.numel() == 1 and pair.bias.is_floating_point()):
            raise ValueError(f"{name}.bias must hold one floating point number, got shape {tuple(pair.bias.shape)} of {pair.bias.dtype}")
    biases = [pair.bias for pair in (student, *teachers)]
    return {
        "dtypes of the biases": [None if bias is None else str(bias.dtype) for bias in biases],
        "gradient of the student's bias": student.bias is not None and wanted(student.bias),
    }


class _Sides(NamedTuple):
    """scale * image, bias as a column, and text, each of all ranks: logits_NN = left @ right.T + bias."""

    left_ND: Tensor
    bias_N1: Tensor
    right_ND: Tensor

    @classmethod
    def of(cls, towers: _BiasedTowers, ranks: Ranks, dtype: torch.dtype) -> _Sides:
        """Scale and bias join the local rows before the gather, so that they too get their own rows' share."""
        image_BD = towers.image.to(dtype)
        bias_B1 = towers.bias.to(dtype).expand(len(image_BD), 1)
        return cls(gather(image_BD * towers.scale.to(dtype), ranks), gather(bias_B1, ranks), gather(towers.text.to(dtype), ranks))


def _divergence(a_NN: Tensor, b_NN: Tensor) -> Tensor:
    """Sum of KL(Bernoulli(sigmoid b) || Bernoulli(sigmoid a)).

    softplus(a) - softplus(b) - sigmoid(b) (a - b) cancels where both are large and positive: there both signs are turned first.
    """
    side_NN = torch.where(b_NN > 0, -1.0, 1.0).to(b_NN.dtype)
    x_NN, y_NN = side_NN * a_NN, side_NN * b_NN
    terms_NN = logsigmoid(-y_NN) - logsigmoid(-x_NN) - y_NN.sigmoid() * (x_NN - y_NN)
    return terms_NN.sum(1).sum()


def _losses(logits_NN: Tensor, teachers: Iterable[Tensor], count: int, hard: bool) -> tuple[Tensor, Tensor]:
    """teachers: the (N, N) logits of `count` teachers, each formed as its turn comes."""
    rows = len(logits_NN)
    kd = siglip = logits_NN.new_zeros(())
    for target_NN in teachers:
        kd = kd + _divergence(logits_NN, target_NN) / (rows * count)
    if hard:
        agreement_NN = 2 * torch.eye(rows, dtype=logits_NN.dtype, device=logits_NN.device) - 1
        siglip = -logsigmoid(agreement_NN * logits_NN).sum(1).sum() / rows
    return kd, siglip


def _losses_of_flat(hard: bool, *sides: Tensor) -> tuple[Tensor, Tensor]:
    """The fields of each model's `_Sides`, one after the other, the student's first."""
    logits = [left_ND @ right_ND.T + bias_N1 for left_ND, bias_N1, right_ND in zip(sides[::3], sides[1::3], sides[2::3], strict=True)]
    return _losses(logits[0], logits[1:], len(logits) - 1, hard)


@cache
def _compiled_losses() -> Any:
    return torch.compile(_losses_of_flat, dynamic=False)


def _eager(
    student: _BiasedTowers, teachers: Sequence[_BiasedTowers], hard: bool, ranks: Ranks, dtype: torch.dtype, compiled: bool
) -> SimilarityLoss:
    """By plain autograd: about six N x N matrices live until the backward pass has run, and three more for each further teacher."""
    sides = [_Sides.of(towers, ranks, dtype) for towers in (student, *teachers)]
    if compiled:
        return SimilarityLoss(*run(partial(_compiled_losses(), hard), [tensor for side in sides for tensor in side]))
    logits = (product(side.left_ND, side.right_ND) + side.bias_N1 for side in sides)
    return SimilarityLoss(*_losses(next(logits), logits, len(teachers), hard))


class _Totals(NamedTuple):
    """One part's sums over the own rows, as far as the columns have come; updated in place. All lack 1 / N.

    loss_B. slope_B: d loss / da. image_BD: slope times the texts, lacks the scale and has half_gain. The last two: None where not needed.
    """

    loss_B: Tensor
    slope_B: Tensor | None
    image_BD: Tensor | None


class _Pass(NamedTuple):
    """needs: whether the gradients of image, text, scale and bias are needed."""

    student: _BiasedTowers
    teachers: Sequence[_BiasedTowers]
    hard: bool
    ranks: Ranks
    dtype: torch.dtype
    needs: tuple[bool, ...]

    def run(self, panels: Elementwise, ring: bool) -> tuple[tuple[Tensor, ...], tuple[Gradients, ...]]:
        """The losses over all ranks, KD first, and the gradients of each."""
        totals = [self._start() for _ in range(bool(self.teachers) + self.hard)]
        image_BD, width = self.student.image, self.student.text.shape[1]
        # the parts' gradients of the texts travel side by side
        share = image_BD.new_empty((0, len(totals) * width), dtype=self.dtype) if self.needs[1] else None
        sweep = Sweep([towers.text for towers in (self.student, *self.teachers)], self.ranks, ring=ring, share=share)
        for block in sweep:
            student, *teachers = self._matrices(block)
            diagonal = own_columns(block, self.ranks.rank * len(image_BD))
            shares = [None] * len(totals) if block.share is None else block.share.split(width, 1)
            for rows, parts in panels.judge(student, teachers, diagonal, self.hard, any(self.needs)):
                for total, part, share_MD in zip(totals, parts, shares, strict=True):
                    _add(total, part, share_MD, rows, student.logits)
        texts = [None] * len(totals) if share is None else sweep.home().split(width, 1)
        sums_WP = self.ranks.gather(torch.stack([total.loss_B.sum() for total in totals])[None])
        losses = sums_WP.sum(0) / (len(image_BD) * self.ranks.world)
        return tuple(losses.unbind()), tuple(self._gradients(total, text_BD) for total, text_BD in zip(totals, texts, strict=True))

    def _start(self) -> _Totals:
        image_BD = self.student.image
        loss_B = image_BD.new_zeros(len(image_BD), dtype=self.dtype)
        slope_B = torch.zeros_like(loss_B) if self.needs[3] else None
        return _Totals(loss_B, slope_B, torch.zeros_like(image_BD, dtype=self.dtype) if self.needs[0] or self.needs[2] else None)

    def _matrices(self, block: Block) -> list[Biased]:
        """The own rows by a block's columns, whose tensors are the student's texts and each teacher's."""
        return [
            Biased(Logits.of(towers.image, right_MD, towers.scale.to(self.dtype)), towers.bias.to(self.dtype))
            for towers, right_MD in zip((self.student, *self.teachers), block.tensors, strict=True)
        ]

    def _gradients(self, total: _Totals, text_BD: Tensor | None) -> Gradients:
        student, (need_image, _, need_scale, _) = self.student, self.needs
        # times world: the mean that data parallelism takes over ranks then gives the gradient of the global loss
        factor = 1 / len(student.image)
        gained = factor / half_gain(student.image.dtype)
        length = student.scale.to(self.dtype) * gained
        image_BD = total.image_BD
        return (
            image_BD * length if need_image and image_BD is not None else None,
            None if text_BD is None else text_BD * length,
            (image_BD * student.image).sum(1).sum() * gained if need_scale and image_BD is not None else None,
            None if total.slope_B is None else total.slope_B.sum() * factor,
        )


def _add(total: _Totals, part: Part, share_MD: Tensor | None, rows: slice, logits: Logits) -> None:
    total.loss_B[rows] += part.loss_c
    if total.slope_B is not None and part.total_c is not None:
        total.slope_B[rows] += part.total_c
    if part.slope_cM is None:
        return
    if total.image_BD is not None:
        add_product(total.image_BD[rows], part.slope_cM, logits.right_ND)
    if share_MD is not None:
        add_product(share_MD, part.slope_cM.T, logits.left_BD[rows])
