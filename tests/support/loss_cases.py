"""Batches, outcomes and recorders that the tests of all losses share."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megakd_kernels as kernels
from megakd_kernels import SimilarityLoss

# Legend: N pairs, D width.
EPS = torch.finfo(torch.float32).eps
GPU = [pytest.mark.gpu]
INTERPRETED = [
    pytest.mark.interpreted,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start: `make test` runs these by themselves"
    ),
]


class Batch(NamedTuple):
    """One model's pairs. The bias is the sigmoid losses' alone."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor = torch.tensor(0.0)

    def leaves(self) -> Batch:
        """The same numbers as fresh leaves that collect gradients."""
        return Batch(*(tensor.detach().clone().requires_grad_() for tensor in self))

    def to(self, device: str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))

    def gradients(self) -> list[Tensor | None]:
        return [tensor.grad for tensor in self]

    def rows(self, rows: slice) -> Batch:
        return self._replace(image=self.image[rows], text=self.text[rows])


def batch(pairs: int, width: int, scale: float, bias: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """Pairs that agree about as far as those of a trained CLIP: the matching cosine stands out of the noise."""
    generator = torch.Generator().manual_seed(1000 * width + seed)
    image, noise = (torch.randn(pairs, width, generator=generator, dtype=torch.float64) for _ in range(2))
    text = 0.3 * normalize(image, dim=-1) + normalize(noise, dim=-1)
    numbers = (torch.tensor(float(number)) for number in (scale, bias))
    return Batch(normalize(image, dim=-1).to(dtype), normalize(text, dim=-1).to(dtype), *numbers)


class Case(NamedTuple):
    """What a loss is given: "similarity", "interactive", which takes the first teacher and has no hard part, or "sigmoid"."""

    loss: str
    student: Batch
    teachers: tuple[Batch, ...]
    hard: bool = True

    def to(self, device: str) -> Case:
        return self._replace(student=self.student.to(device), teachers=tuple(teacher.to(device) for teacher in self.teachers))


def forward(case: Case, student: Batch, **options) -> SimilarityLoss:
    if case.loss == "interactive":
        loss = kernels.interactive_kd(student, case.teachers[0], **options)
        return SimilarityLoss(loss, loss.new_zeros(()))
    function = kernels.similarity_kd if case.loss == "similarity" else kernels.sigmoid_kd
    return function(student, list(case.teachers) or None, hard=case.hard, **options)


def forward_reference(case: Case, student: Batch, **options) -> SimilarityLoss:
    if case.loss == "interactive":
        loss = kernels.interactive_kd_reference(student, case.teachers[0])
        return SimilarityLoss(loss, loss.new_zeros(()))
    function = kernels.similarity_kd_reference if case.loss == "similarity" else kernels.sigmoid_kd_reference
    return function(student, list(case.teachers), hard=case.hard, **options)


class Outcome(NamedTuple):
    """The two losses and the gradients of image, text, scale and bias, each as float64 on the CPU."""

    kd: Tensor
    hard: Tensor
    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def of(cls, *shares: float) -> Outcome:
        """A number for each part; 0 for those at the end that are not given."""
        return cls(*(torch.tensor(share) for share in (*shares, *[0.0] * (len(cls._fields) - len(shares)))))


def outcome(loss: SimilarityLoss, leaves: Batch, upstream: float) -> Outcome:
    (upstream * loss.kd + 0.5 * upstream * loss.hard).backward()
    gradients = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    return Outcome(*(tensor.detach().cpu().double() for tensor in (*loss, *gradients)))


def measure(case: Case, *, upstream: float = 2.5, **options) -> Outcome:
    leaves = case.student.leaves()
    return outcome(forward(case, leaves, **options), leaves, upstream)


def measure_reference(case: Case, *, upstream: float = 2.5, **options) -> Outcome:
    leaves = Batch(*(tensor.double() for tensor in case.student)).leaves()
    return outcome(forward_reference(case, leaves, **options), leaves, upstream)


def errors(ours: Outcome, truth: Outcome) -> Outcome:
    """Distance of each part from the truth, by its norm."""
    return Outcome(*((part - true).norm() for part, true in zip(ours, truth, strict=True)))


class Watch(TorchDispatchMode):
    """Remembers the most elements that any tensor had, and counts the matrix products."""

    elements = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return result
