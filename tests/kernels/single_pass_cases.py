"""Batches and measurements that the tests of `interactive_kd` and `sigmoid_kd` share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megakd_kernels import SimilarityLoss
from megakd_kernels.interactive import interactive_kd
from megakd_kernels.reference import interactive_kd_reference, sigmoid_kd_reference
from megakd_kernels.sigmoid import sigmoid_kd

# Legend: N pairs, D width.
LOSSES = ("interactive", "sigmoid")


class Batch(NamedTuple):
    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor

    def leaves(self) -> Batch:
        """The same numbers as fresh leaves that collect gradients."""
        return Batch(*(tensor.detach().clone().requires_grad_() for tensor in self))

    def gradients(self) -> list[Tensor | None]:
        return [tensor.grad for tensor in self]


def batch(pairs: int, width: int, scale: float, bias: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """Pairs that agree about as far as those of a trained CLIP: the matching cosine stands out of the noise."""
    generator = torch.Generator().manual_seed(1000 * width + seed)
    image, noise = (torch.randn(pairs, width, generator=generator, dtype=torch.float64) for _ in range(2))
    text = 0.3 * normalize(image, dim=-1) + normalize(noise, dim=-1)
    numbers = (torch.tensor(float(number)) for number in (scale, bias))
    return Batch(normalize(image, dim=-1).to(dtype), normalize(text, dim=-1).to(dtype), *numbers)


class Case(NamedTuple):
    """What a loss is given. `hard` is the sigmoid loss's alone; `interactive` takes the first teacher."""

    loss: str
    student: Batch
    teachers: tuple[Batch, ...]
    hard: bool = True

    def to(self, device: str) -> Case:
        student, *teachers = (Batch(*(tensor.to(device) for tensor in each)) for each in (self.student, *self.teachers))
        return self._replace(student=student, teachers=tuple(teachers))


def make(
    loss: str,
    pairs: int,
    width: int,
    scale: float,
    teachers: Sequence[tuple[int, float, float]],
    *,
    bias: float = -10.0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """teachers: width, scale and bias of each."""
    guides = tuple(batch(pairs, *each, dtype, seed=2 + place) for place, each in enumerate(teachers))
    return Case(loss, batch(pairs, width, scale, bias, dtype, seed=1), guides)


def forward(case: Case, student: Batch, **options) -> SimilarityLoss:
    if case.loss == "interactive":
        loss = interactive_kd(student, case.teachers[0], **options)
        return SimilarityLoss(loss, loss.new_zeros(()))
    return sigmoid_kd(student, list(case.teachers) or None, hard=case.hard, **options)


class Outcome(NamedTuple):
    """The two losses and the gradients of image, text, scale and bias, each as float64."""

    kd: Tensor
    hard: Tensor
    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor


def _outcome(loss: SimilarityLoss, leaves: Batch, upstream: float) -> Outcome:
    (upstream * loss.kd + 0.5 * upstream * loss.hard).backward()
    gradients = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    return Outcome(*(tensor.detach().double() for tensor in (*loss, *gradients)))


def measure(case: Case, *, upstream: float = 2.5, **options) -> Outcome:
    leaves = case.student.leaves()
    return _outcome(forward(case, leaves, **options), leaves, upstream)


def measure_reference(case: Case, *, upstream: float = 2.5) -> Outcome:
    leaves = Batch(*(tensor.double() for tensor in case.student)).leaves()
    if case.loss == "interactive":
        loss = interactive_kd_reference(leaves, case.teachers[0])
        return _outcome(SimilarityLoss(loss, loss.new_zeros(())), leaves, upstream)
    return _outcome(sigmoid_kd_reference(leaves, case.teachers, hard=case.hard), leaves, upstream)


def errors(outcome: Outcome, truth: Outcome) -> Outcome:
    """Distance of each part from the truth, by its norm."""
    return Outcome(*((ours.cpu() - true.cpu()).norm() for ours, true in zip(outcome, truth, strict=True)))


def rounding(case: Case, *, upstream: float = 2.5) -> Outcome:
    """How far one float32 rounding of the largest logit can move each part: the unit in which errors are judged.

    A relative error alone would judge the data: a loss of 1e-10 from logits of 100 has no correct digit in float32.
    """
    return (_interactive_rounding if case.loss == "interactive" else _sigmoid_rounding)(case, upstream)


EPS = torch.finfo(torch.float32).eps


def _interactive_rounding(case: Case, upstream: float) -> Outcome:
    """A logit wrong by d makes -log softmax wrong by up to 2 d and the softmax by a factor 1 + d; a row's slope has a norm of up to 2."""
    (image, text, scale, _), teacher = (tensor.double() for tensor in case.student), case.teachers[0]
    products = (image @ teacher.text.double().T, text @ teacher.image.double().T)
    soft = EPS * (1 + max(float((scale * product).abs().max()) for product in products))
    width = upstream * scale * soft / len(image) ** 0.5
    return Outcome(*(torch.as_tensor(part).double() for part in (2 * soft, 0, width, width, 2 * upstream * soft, 0)))


def _logits(pair: Batch) -> Tensor:
    image, text, scale, bias = (tensor.double() for tensor in pair)
    return scale * image @ text.T + bias


def _sigmoid_rounding(case: Case, upstream: float) -> Outcome:
    """Every term of the sums by itself, as if all roundings had one sign: what wrong logits do to it, and its own evaluation.

    Near 0 loss (well matched, or far apart in student and teacher alike) a term may only be wrong by eps times its small summands.
    """
    a, targets = _logits(case.student), [_logits(teacher) for teacher in case.teachers]
    pairs, scale = len(a), float(case.student.scale)
    wrong = EPS * (1 + max(float(logits.abs().max()) for logits in (a, *targets)))
    steep = torch.sigmoid(a) * torch.sigmoid(-a)
    kd, slope = torch.zeros_like(a), torch.zeros_like(a)
    for b in targets:
        bent, gap = torch.sigmoid(b) * torch.sigmoid(-b), a - b
        kd += wrong * ((a.sigmoid() - b.sigmoid()).abs() + bent * gap.abs())
        kd += EPS * (softplus(-a.abs()) + softplus(-b.abs()) + torch.sigmoid(-b.abs()) * gap.abs())
        slope += upstream * (wrong * (steep + bent) + EPS * (a.sigmoid() + b.sigmoid()))
    if targets:
        kd, slope = kd / len(targets), slope / len(targets)
    hard = torch.zeros_like(a)
    if case.hard:
        agreement = 2 * torch.eye(pairs, dtype=a.dtype) - 1
        hard = wrong * torch.sigmoid(-agreement * a) + EPS * softplus(-agreement * a)
        slope = slope + 0.5 * upstream * (wrong * steep + EPS * torch.sigmoid(-agreement * a))
    sums = (slope.sum(1).norm() * scale, slope.sum(0).norm() * scale, slope.sum() * (1 + wrong), slope.sum())
    return Outcome(*(total / pairs for total in (kd.sum(), hard.sum(), *sums)))


def judge(case: Case, outcomes: dict[str, Outcome], margin: Outcome, excess: Outcome, halves: bool = False) -> None:
    """outcomes["eager"] is within `margin` roundings of float64, and the others' errors within `excess` roundings of eager's.

    halves: the device multiplies halves, so the slopes were rounded to the embeddings' dtype before the second product.
    """
    truth, unit = measure_reference(case), rounding(case)
    eager = errors(outcomes["eager"], truth)
    for place, part in enumerate(Outcome._fields):
        one, true = unit[place], truth[place].norm()
        dtype = getattr(case.student, part).dtype if part in Batch._fields else torch.float32
        returned = torch.finfo(dtype).eps / 2 * true
        assert eager[place] <= returned + margin[place] * one, f"eager {part}: off by {eager[place]:.3g}, unit {one:.3g}, true {true:.3g}"
        for name, outcome in outcomes.items():
            off = errors(outcome, truth)[place]
            cast = 4 * torch.finfo(case.student.image.dtype).eps if halves and part in ("image", "text", "scale") else EPS
            more = cast * true + excess[place] * one
            assert off <= eager[place] + more, f"{name} {part}: off by {off:.3g}, eager {eager[place]:.3g}, unit {one:.3g}, true {true:.3g}"


class Watch(TorchDispatchMode):
    """Remembers the most elements that any tensor had, and counts the matrix products."""

    elements = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return result


def interpreted(script: str, result: Path) -> object:
    """What `script` saves in `result` when it runs under Triton's interpreter, which must be chosen before Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, script, str(result)], env=environment, check=True, timeout=240)
    return torch.load(result, weights_only=False)
