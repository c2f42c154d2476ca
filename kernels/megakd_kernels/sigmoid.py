"""The sigmoid losses over the similarity matrix: each image-text pair of the batch is a binary classification of its own.

Legend: B rows of this rank, N rows of all ranks, D width, M columns of a block, c rows of a panel, K teachers, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import logsigmoid

from megakd_kernels.dispatch import choose, one_pass_kernels
from megakd_kernels.distributed import Block, Facts, Ranks, Sweep, agree, gather_rows
from megakd_kernels.one_pass import BiasedLogits, Gradients, OnePassKernels, SigmoidPanel, differentiable, half_gain
from megakd_kernels.panels import Logits, add_product
from megakd_kernels.precision import full_precision, product, run_compiled
from megakd_kernels.types import BiasedPair, SimilarityLoss, check_pairs, compute_dtype, device_of, needs_grad


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
    """KL(teacher || student) of the match probability of each image-text pair; with `hard` also SigLIP's own loss.

    a = student.scale * student.image @ student.text.T + student.bias, (N, N), N the pairs of all ranks; b_k likewise of teacher k.
    kd   = 1 / N * sum over m, n of the mean over k of KL(Bernoulli(sigmoid(b_k)) || Bernoulli(sigmoid(a))):
           the cross-entropy against soft targets less the teachers' own entropy, so its gradient is (sigmoid(a) - mean sigmoid(b_k)) / N.
    hard = 1 / N * sum over m, n of softplus(-z a), z = 1 where m = n and -1 elsewhere.
    The weights of the two in a total are the caller's.

    student, each teacher: image (B, D), text (B, D), scale () or (1,), bias likewise or None, floating point; widths D, scales and
    biases are each model's own. Several teachers come as a list (a tuple may be one model's embeddings). Without a teacher kd is 0;
    a part that was not asked for is 0 without a gradient. Where every teacher and the student hold the same numbers kd is exactly 0.
    Returns scalars. Their dtype, the precision inside, which tensors get gradients, their scale on several ranks, second derivatives,
    determinism and group: as of `similarity_kd`; the bias is treated as the scale is. Each term is exact to a few roundings of its
    largest logit, of any size. Gradients are accumulated in the forward pass: 6 D + 2 sum D_k FLOPs times N^2 for one part,
    10 D + 2 sum D_k for both, and 4 N^2 D less for each where no input requires one.

    backend, chunk, ring: see `interactive_kd`; the ring takes the texts of student and teachers around, and the gradients back.

    Raises ValueError for a chunk out of range, an unknown backend, an empty list of teachers, and pairs of unequal shape; on
    several ranks a fault of one rank raises on all.
    Source: SigLIP (arXiv 2303.15343).
    """
    ranks = Ranks.of(group)
    teachers = [] if teacher is None else teacher if isinstance(teacher, list) else [teacher]

    def check() -> Facts:
        if isinstance(teacher, list) and not teacher:
            raise ValueError("the list of teachers is empty: pass None for no teacher")
        facts = {**check_pairs(student, teachers), **_check_biases(student, teachers)}
        fields = [field for pair in (student, *teachers) for field in (pair.image, pair.text, pair.scale, pair.bias) if field is not None]
        pairs, dtype = len(student.image) * ranks.world, compute_dtype(*fields)
        chosen = choose("sigmoid_kd", pairs, student.image.device, dtype, backend=backend, ring=ring, chunk=chunk)
        return {**facts, "hard": hard, "ring": ring, "backend": chosen}

    chosen = agree(check, ranks, device_of(student))["backend"]
    checked = _CheckedBiasedPair.of(student)
    frozen = [_CheckedBiasedPair(*(tensor.detach() for tensor in _CheckedBiasedPair.of(each))) for each in teachers]
    dtype, device = compute_dtype(*checked, *(tensor for each in frozen for tensor in each)), checked.image.device
    rows = len(checked.image)
    with full_precision(device):
        if chosen in ("eager", "compiled"):
            return _eager(checked, frozen, hard, ranks, dtype, compiled=chosen == "compiled")
        kernels = one_pass_kernels(chosen, rows, rows if ring else rows * ranks.world, device, dtype, chunk)
        zero = torch.zeros((), dtype=dtype, device=device)
        if not frozen and not hard:
            return SimilarityLoss(zero, zero)
        needs = needs_grad(*checked)
        with torch.no_grad():
            sums, gradients = _OnePass(checked, frozen, hard, ranks, dtype, needs).run(kernels, ring)
        losses = list(differentiable(sums, gradients, checked))
        return SimilarityLoss(losses.pop(0) if frozen else zero, losses.pop() if hard else zero)


class _CheckedBiasedPair(NamedTuple):
    """A `BiasedPair` as the backends take it: checked, scale and bias of shape ()."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def of(cls, pair: BiasedPair) -> _CheckedBiasedPair:
        bias = torch.zeros_like(pair.scale, requires_grad=False) if pair.bias is None else pair.bias
        return cls(pair.image, pair.text, pair.scale.reshape(()), bias.reshape(()))


def _check_biases(student: BiasedPair, teachers: Sequence[BiasedPair]) -> Facts:
    """Raises ValueError for a bias that is not one floating point number; returns what must be equal on all ranks."""
    for name, pair in (("student", student), *(("teacher", each) for each in teachers)):
        if pair.bias is not None and not (pair.bias.numel() == 1 and pair.bias.is_floating_point()):
            raise ValueError(f"{name}.bias must hold one floating point number, got shape {tuple(pair.bias.shape)} of {pair.bias.dtype}")
    biases = [pair.bias for pair in (student, *teachers)]
    return {
        "dtypes of the biases": [None if bias is None else str(bias.dtype) for bias in biases],
        "gradient of the student's bias": student.bias is not None and needs_grad(student.bias),
    }


class _Factors(NamedTuple):
    """Of all ranks: logits_NN = left @ right.T + bias, with left = scale * image and right = text."""

    left_ND: Tensor
    bias_N1: Tensor
    right_ND: Tensor

    @classmethod
    def of(cls, pair: _CheckedBiasedPair, ranks: Ranks, dtype: torch.dtype) -> _Factors:
        """Scale and bias join the local rows before the gather, so their gradients too are of the own rows."""
        image_BD = pair.image.to(dtype)
        bias_B1 = pair.bias.to(dtype).expand(len(image_BD), 1)
        text_ND = gather_rows(pair.text.to(dtype), ranks)
        return cls(gather_rows(image_BD * pair.scale.to(dtype), ranks), gather_rows(bias_B1, ranks), text_ND)


def _divergence(a_NN: Tensor, b_NN: Tensor) -> Tensor:
    """Sum of KL(Bernoulli(sigmoid b) || Bernoulli(sigmoid a)).

    softplus(a) - softplus(b) - sigmoid(b) (a - b) cancels where both are large and positive: there both signs are flipped first.
    """
    sign_NN = torch.where(b_NN > 0, -1.0, 1.0).to(b_NN.dtype)
    x_NN, y_NN = sign_NN * a_NN, sign_NN * b_NN
    terms_NN = logsigmoid(-y_NN) - logsigmoid(-x_NN) - y_NN.sigmoid() * (x_NN - y_NN)
    return terms_NN.sum(1).sum()


def _losses(logits_NN: Tensor, teachers: Iterable[Tensor], count: int, hard: bool) -> tuple[Tensor, Tensor]:
    """teachers: the (N, N) logits of `count` teachers, each formed when it is reached."""
    rows = len(logits_NN)
    kd = siglip = logits_NN.new_zeros(())
    for teacher_NN in teachers:
        kd = kd + _divergence(logits_NN, teacher_NN) / (rows * count)
    if hard:
        label_NN = 2 * torch.eye(rows, dtype=logits_NN.dtype, device=logits_NN.device) - 1
        siglip = -logsigmoid(label_NN * logits_NN).sum(1).sum() / rows
    return kd, siglip


def _losses_of_factors(hard: bool, *factors: Tensor) -> tuple[Tensor, Tensor]:
    """factors: the fields of each model's `_Factors`, one after the other, the student's first."""
    logits = [left_ND @ right_ND.T + bias_N1 for left_ND, bias_N1, right_ND in zip(factors[::3], factors[1::3], factors[2::3], strict=True)]
    return _losses(logits[0], logits[1:], len(logits) - 1, hard)


def _eager(
    student: _CheckedBiasedPair, teachers: Sequence[_CheckedBiasedPair], hard: bool, ranks: Ranks, dtype: torch.dtype, compiled: bool
) -> SimilarityLoss:
    """By plain autograd: about six N x N matrices live until the backward pass has run, and three more for each further teacher."""
    factors = [_Factors.of(pair, ranks, dtype) for pair in (student, *teachers)]
    if compiled:
        return SimilarityLoss(*run_compiled(_losses_of_factors, [tensor for each in factors for tensor in each], hard))
    logits = (product(each.left_ND, each.right_ND) + each.bias_N1 for each in factors)
    return SimilarityLoss(*_losses(next(logits), logits, len(teachers), hard))


class _PartSums(NamedTuple):
    """One part's sums over the own rows and the columns seen so far; updated in place. All lack 1 / N.

    loss_B. slope_B: d loss / da. image_BD: slope times the texts, lacks the scale and has half_gain. The last two: None where not needed.
    """

    loss_B: Tensor
    slope_B: Tensor | None
    image_BD: Tensor | None

    def add(self, panel: SigmoidPanel, text_grad_MD: Tensor | None, rows: slice, logits: Logits) -> None:
        """text_grad_MD: the gradient of a block's texts, to which this panel's part is added as well."""
        self.loss_B[rows] += panel.loss_c
        if self.slope_B is not None and panel.slope_c is not None:
            self.slope_B[rows] += panel.slope_c
        if panel.slope_cM is None:
            return
        if self.image_BD is not None:
            add_product(self.image_BD[rows], panel.slope_cM, logits.right_ND)
        if text_grad_MD is not None:
            add_product(text_grad_MD, panel.slope_cM.T, logits.left_BD[rows])


class _OnePass(NamedTuple):
    """needs: whether the gradients of image, text, scale and bias are needed."""

    student: _CheckedBiasedPair
    teachers: Sequence[_CheckedBiasedPair]
    hard: bool
    ranks: Ranks
    dtype: torch.dtype
    needs: tuple[bool, ...]

    def run(self, kernels: OnePassKernels, ring: bool) -> tuple[tuple[Tensor, ...], tuple[Gradients, ...]]:
        """The losses over all ranks, KD first, and the gradients of each."""
        parts = [self._zero_sums() for _ in range(bool(self.teachers) + self.hard)]
        image_BD, width = self.student.image, self.student.text.shape[1]
        # the parts' gradients of the texts travel side by side
        grad_like = image_BD.new_empty((0, len(parts) * width), dtype=self.dtype) if self.needs[1] else None
        sweep = Sweep([pair.text for pair in (self.student, *self.teachers)], self.ranks, ring=ring, grad_like=grad_like)
        for block in sweep:
            student, *teachers = self._logits(block)
            diagonal = block.diagonal(self.ranks.rank * len(image_BD))
            text_grads = [None] * len(parts) if block.grad is None else block.grad.split(width, 1)
            for rows, panels in kernels.sigmoid_panels(student, teachers, diagonal, self.hard, any(self.needs)):
                for part, panel, text_grad_MD in zip(parts, panels, text_grads, strict=True):
                    part.add(panel, text_grad_MD, rows, student.logits)
        texts = [None] * len(parts) if grad_like is None else sweep.own_grad().split(width, 1)
        sums_WP = self.ranks.gather(torch.stack([part.loss_B.sum() for part in parts])[None])
        losses = sums_WP.sum(0) / (len(image_BD) * self.ranks.world)
        return tuple(losses.unbind()), tuple(self._gradients(part, text_BD) for part, text_BD in zip(parts, texts, strict=True))

    def _zero_sums(self) -> _PartSums:
        image_BD = self.student.image
        loss_B = image_BD.new_zeros(len(image_BD), dtype=self.dtype)
        slope_B = torch.zeros_like(loss_B) if self.needs[3] else None
        return _PartSums(loss_B, slope_B, torch.zeros_like(image_BD, dtype=self.dtype) if self.needs[0] or self.needs[2] else None)

    def _logits(self, block: Block) -> list[BiasedLogits]:
        """The own rows by a block's columns, whose tensors are the student's texts and each teacher's."""
        return [
            BiasedLogits(Logits.of(pair.image, right_MD, pair.scale.to(self.dtype)), pair.bias.to(self.dtype))
            for pair, right_MD in zip((self.student, *self.teachers), block.tensors, strict=True)
        ]

    def _gradients(self, part: _PartSums, text_BD: Tensor | None) -> Gradients:
        student, (need_image, _, need_scale, _) = self.student, self.needs
        # times world: the mean that data parallelism takes over ranks then gives the gradient of the global loss
        factor = 1 / len(student.image)
        without_gain = factor / half_gain(student.image.dtype)
        scaled = student.scale.to(self.dtype) * without_gain
        image_BD = part.image_BD
        return (
            image_BD * scaled if need_image and image_BD is not None else None,
            None if text_BD is None else text_BD * scaled,
            (image_BD * student.image).sum(1).sum() * without_gain if need_scale and image_BD is not None else None,
            None if part.slope_B is None else part.slope_B.sum() * factor,
        )
