"""Batches and measurements that the tests of the similarity losses share."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from megakd_kernels import SimilarityLoss, similarity_kd, similarity_kd_reference

# Legend: N pairs, D width.

GPU = [pytest.mark.gpu]
INTERPRETED = [
    pytest.mark.interpreted,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start: `make test` runs these by themselves"
    ),
]
# The backends that are judged by eager, and the devices they run on here.
RIVALS = [
    pytest.param("chunked", "cpu", id="chunked"),
    pytest.param("triton", "cpu", id="triton interpreted", marks=INTERPRETED),
    pytest.param("chunked", "cuda", id="chunked on CUDA", marks=GPU),
    pytest.param("triton", "cuda", id="triton on CUDA", marks=GPU),
]


class Batch(NamedTuple):
    image: Tensor
    text: Tensor
    scale: Tensor

    def leaves(self) -> Batch:
        """The same numbers as fresh leaves that collect gradients."""
        return Batch(*(tensor.detach().clone().requires_grad_() for tensor in self))

    def to(self, device: str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))

    def gradients(self) -> list[Tensor | None]:
        return [tensor.grad for tensor in self]


def batch(pairs: int, width: int, scale: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """Pairs that agree about as far as those of a trained CLIP: the matching cosine stands out of the noise."""
    generator = torch.Generator().manual_seed(1000 * width + seed)
    image, noise = (torch.randn(pairs, width, generator=generator, dtype=torch.float64) for _ in range(2))
    text = 0.3 * normalize(image, dim=-1) + normalize(noise, dim=-1)
    return Batch(normalize(image, dim=-1).to(dtype), normalize(text, dim=-1).to(dtype), torch.tensor(float(scale)))


class Outcome(NamedTuple):
    """The two losses and the gradients of image, text and scale, each as float64."""

    kd: Tensor
    hard: Tensor
    image: Tensor
    text: Tensor
    scale: Tensor


def _outcome(loss: SimilarityLoss, leaves: Batch, upstream: float) -> Outcome:
    (upstream * loss.kd + 0.5 * upstream * loss.hard).backward()
    return Outcome(*(tensor.detach().cpu().double() for tensor in (*loss, leaves.image.grad, leaves.text.grad, leaves.scale.grad)))


Teacher = Batch | list[Batch] | None


def measure(student: Batch, teacher: Teacher, *, upstream: float = 2.5, **options) -> Outcome:
    leaves = student.leaves()
    return _outcome(similarity_kd(leaves, teacher, **options), leaves, upstream)


def measure_reference(student: Batch, teacher: Teacher, *, upstream: float = 2.5, scale_limit: float | None = None, **options) -> Outcome:
    del scale_limit  # a promise to the kernels
    leaves = Batch(*(tensor.double() for tensor in student)).leaves()
    return _outcome(similarity_kd_reference(leaves, teacher, **options), leaves, upstream)


def errors(outcome: Outcome, truth: Outcome) -> Outcome:
    """Distance of each part from the truth, by its norm."""
    return Outcome(*((ours - true).norm() for ours, true in zip(outcome, truth, strict=True)))


def rounding(student: Batch, teacher: Teacher, truth: Outcome, *, temperature: float, upstream: float = 2.5) -> Outcome:
    """How far one float32 rounding of the largest logit can move each part: the unit in which errors are judged.

    A relative error alone would judge the data: a loss of 1e-10 from logits of 100 has no correct digit in float32.
    A logit wrong by d makes a KL or an InfoNCE wrong by up to 2 d, and a softmax by a factor of 1 + d; each of the four softmaxes
    times N unit vectors has a norm of about sqrt(N). The losses also round once as they are returned.
    """
    pairs, scale = len(student.image), float(student.scale)
    models = [student, *(teacher if isinstance(teacher, list) else [teacher] if teacher else [])]
    largest = max(float((pair.scale.double() * (pair.image.double() @ pair.text.double().T)).abs().max()) for pair in models)
    eps = torch.finfo(torch.float32).eps
    soft, sharp = eps * (1 + largest / temperature), eps * (1 + largest)
    slope = 4 * upstream * (temperature * soft + 0.5 * sharp) / (2 * pairs)
    width = torch.as_tensor(scale * slope * pairs**0.5).double()
    kd, hard = 2 * temperature**2 * soft + eps * truth.kd, 2 * sharp + eps * truth.hard
    return Outcome(kd, hard, width, width, torch.as_tensor(slope * pairs).double())
