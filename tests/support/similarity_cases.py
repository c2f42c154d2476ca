"""Backends, measurements and the unit of error for the tests of the similarity losses."""

from __future__ import annotations

import pytest
import torch

from support import loss_cases
from support.loss_cases import EPS, GPU, INTERPRETED, Batch, Case, Outcome

# The backends that are judged by eager, and the devices they run on here.
RIVALS = [
    pytest.param("chunked", "cpu", id="chunked"),
    pytest.param("triton", "cpu", id="triton interpreted", marks=INTERPRETED),
    pytest.param("chunked", "cuda", id="chunked on CUDA", marks=GPU),
    pytest.param("triton", "cuda", id="triton on CUDA", marks=GPU),
]

Teacher = Batch | list[Batch] | None


def _case(student: Batch, teacher: Teacher, hard: bool) -> Case:
    return Case("similarity", student, tuple(teacher if isinstance(teacher, list) else [teacher] if teacher else []), hard)


def measure(student: Batch, teacher: Teacher, *, hard: bool = False, **options) -> Outcome:
    return loss_cases.measure(_case(student, teacher, hard), **options)


def measure_reference(student: Batch, teacher: Teacher, *, hard: bool = False, scale_limit: float | None = None, **options) -> Outcome:
    del scale_limit  # a promise to the kernels
    return loss_cases.measure_reference(_case(student, teacher, hard), **options)


def rounding(student: Batch, teacher: Teacher, truth: Outcome, *, temperature: float, upstream: float = 2.5) -> Outcome:
    """How far one float32 rounding of the largest logit can move each part: the unit in which errors are judged.

    A relative error alone would judge the data: a loss of 1e-10 from logits of 100 has no correct digit in float32.
    A logit wrong by d makes a KL or an InfoNCE wrong by up to 2 d, and a softmax by a factor of 1 + d; each of the four softmaxes
    times N unit vectors has a norm of about sqrt(N). The losses also round once as they are returned.
    """
    pairs, scale = len(student.image), float(student.scale)
    models = [student, *_case(student, teacher, False).teachers]
    largest = max(float((pair.scale.double() * (pair.image.double() @ pair.text.double().T)).abs().max()) for pair in models)
    soft, sharp = EPS * (1 + largest / temperature), EPS * (1 + largest)
    slope = 4 * upstream * (temperature * soft + 0.5 * sharp) / (2 * pairs)
    width = torch.as_tensor(scale * slope * pairs**0.5).double()
    kd, hard = 2 * temperature**2 * soft + EPS * truth.kd, 2 * sharp + EPS * truth.hard
    return Outcome(kd, hard, width, width, torch.as_tensor(slope * pairs).double(), torch.zeros(()))
