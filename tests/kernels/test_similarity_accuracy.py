"""Every backend against float64: right by itself, and no worse than eager."""

from __future__ import annotations

import pytest
import torch
from similarity_cases import Batch, Outcome, batch, errors, measure, measure_reference, rounding

# Shares of `rounding` that eager's error, and what the chunked error has beyond it, may reach: about twice the largest seen over the
# cases below on one CPU, 0.33, 0.53, 0.07, 0.07, 0.003 and 0.01, 0.15, 0.003, 0.003, 0.004, more where that is very little.
MARGIN = Outcome(*(torch.tensor(share) for share in (0.8, 1.0, 0.15, 0.15, 0.01)))
EXCESS = Outcome(*(torch.tensor(share) for share in (0.3, 0.3, 0.03, 0.03, 0.01)))

# pairs, student width, teacher width, temperature, student scale, teacher scale, chunk
CASES = [
    (1, 48, 64, 1.0, 20, 20, 1),
    (2, 48, 64, 1.0, 10, 50, 1),
    (37, 48, 1536, 2.0, 100, 30, 37),
    (37, 64, 48, 0.05, 100, 100, 8),
    (129, 512, 768, 20.0, 1, 1, 50),
    (129, 64, 64, 0.05, 1, 200, 128),
    (129, 1536, 48, 4.0, 200, 1, 1),
    (1000, 256, 64, 0.05, 100, 100, 300),
    (1000, 64, 256, 20.0, 1, 10, 999),
    (1000, 256, 256, 1.0, 100, 100, 64),
]


def _judge(student: Batch, teacher: Batch, temperature: float, chunk: int, hard: bool = True) -> None:
    truth = measure_reference(student, teacher, temperature=temperature, hard=hard)
    unit = rounding(student, teacher, truth, temperature=temperature)
    eager = errors(measure(student, teacher, temperature=temperature, hard=hard, backend="eager"), truth)
    chunked = errors(measure(student, teacher, temperature=temperature, hard=hard, backend="chunked", chunk=chunk), truth)
    for part, share, more, one, ours, theirs, true in zip(Outcome._fields, MARGIN, EXCESS, unit, chunked, eager, truth, strict=True):
        dtype = getattr(student, part).dtype if part in Batch._fields else torch.float32
        returned = torch.finfo(dtype).eps / 2 * true.norm() if dtype.itemsize < 4 else 0.0
        assert theirs <= returned + share * one, f"eager {part}: off by {theirs:.3g}, unit {one:.3g}, true norm {true.norm():.3g}"
        assert ours <= theirs + more * one, f"chunked {part}: off by {ours:.3g}, eager by {theirs:.3g}, unit {one:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_losses_and_gradients_match_float64(case, dtype):
    pairs, width, teacher_width, temperature, scale, teacher_scale, chunk = case
    _judge(batch(pairs, width, scale, dtype, seed=1), batch(pairs, teacher_width, teacher_scale, dtype, seed=2), temperature, chunk)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_kd_alone_matches_float64(temperature):
    _judge(batch(65, 48, 50, seed=1), batch(65, 32, 80, seed=2), temperature, chunk=16, hard=False)


def test_a_teacher_in_half_precision_guides_a_student_in_full():
    _judge(batch(65, 48, 50, seed=1), batch(65, 32, 80, torch.bfloat16, seed=2), 1.0, chunk=16)


def test_one_very_large_logit_neither_overflows_nor_drowns_the_rest():
    student, teacher = batch(37, 48, 100, seed=1), batch(37, 64, 100, seed=2)
    for pair in (student, teacher):
        pair.image[3] *= 30.0
        pair.text[20] = pair.image[3] / pair.image[3].norm()
    _judge(student, teacher, 1.0, chunk=10)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_identical_rows_give_uniform_softmaxes(backend):
    student = Batch(*(tensor[:1].expand(40, -1).contiguous() for tensor in batch(1, 48, 100)[:2]), torch.tensor(100.0))
    teacher = Batch(*(tensor[:1].expand(40, -1).contiguous() for tensor in batch(1, 64, 100)[:2]), torch.tensor(50.0))
    outcome = measure(student, teacher, hard=True, backend=backend)
    assert abs(outcome.kd) < 1e-6
    assert abs(outcome.hard - torch.tensor(40.0).double().log()) < 1e-6
    assert outcome.image.norm() < 1e-4
    assert outcome.scale.abs() < 1e-6


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_a_student_equal_to_its_teacher_has_a_divergence_of_exactly_zero(backend, dtype, temperature):
    twin = batch(129, 64, 100, dtype)
    options = {"chunk": 37} if backend == "chunked" else {}
    assert measure(twin, twin, temperature=temperature, hard=True, backend=backend, **options).kd == 0


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"backend": "chunked", "chunk": 2}, {"backend": "chunked", "chunk": 5}], ids=str)
@pytest.mark.parametrize(("temperature", "hard"), [(1.0, False), (1.0, True), (0.7, True), (2.0, False)])
def test_gradients_match_finite_differences(options, temperature, hard):
    from megakd_kernels import similarity_kd

    student, teacher = (batch(5, width, 6.0, torch.float64, seed=width) for width in (3, 4))
    leaves = Batch(*(tensor.double().requires_grad_() for tensor in student))

    def total(*tensors):
        kd, infonce = similarity_kd(Batch(*tensors), teacher, temperature=temperature, hard=hard, **options)
        return 1.5 * kd + 0.5 * infonce

    assert torch.autograd.gradcheck(total, tuple(leaves))
