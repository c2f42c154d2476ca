"""`interactive_kd` by every backend against float64: right by itself, and no worse than eager."""

from __future__ import annotations

import pytest
import torch
from single_pass_cases import Batch, Case, Outcome, batch, forward, judge, make, measure

# Shares of `rounding` that eager's error, and what the others' errors have beyond it, may reach: about twice the largest seen over the
# cases below on one CPU, 0.20, 0.52, 0.52 and 0.006; nothing was seen beyond eager's.
MARGIN = Outcome(*(torch.tensor(share) for share in (0.4, 0.0, 1.1, 1.1, 0.02, 0.0)))
EXCESS = Outcome(*(torch.tensor(share) for share in (0.1, 0.0, 0.1, 0.1, 0.02, 0.0)))

# pairs, width, scale, chunk
CASES = [
    (1, 48, 20, 1),
    (2, 64, 50, 1),
    (37, 48, 100, 8),
    (37, 1536, 200, 37),
    (129, 512, 1, 50),
    (129, 64, 200, 128),
    (1000, 256, 100, 300),
    (1000, 64, 10, 999),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _case(pairs: int, width: int, scale: float, dtype: torch.dtype = torch.float32) -> Case:
    return make("interactive", pairs, width, scale, [(width, 30.0, 0.0)], dtype=dtype)


def _judge(case: Case, chunk: int) -> None:
    judge(case, {"eager": measure(case, backend="eager"), "chunked": measure(case, backend="chunked", chunk=chunk)}, MARGIN, EXCESS)


@EACH_DTYPE
@EACH_CASE
def test_loss_and_gradients_match_float64(case, dtype):
    *shape, chunk = case
    _judge(_case(*shape, dtype), chunk)


def test_a_teacher_in_half_precision_guides_a_student_in_full():
    student, teacher = batch(65, 48, 50, seed=1), batch(65, 48, 80, dtype=torch.bfloat16, seed=2)
    _judge(Case("interactive", student, (teacher,)), 16)


def test_one_very_large_logit_neither_overflows_nor_drowns_the_rest():
    case = _case(37, 48, 100)
    case.student.image[3] *= 30.0
    case.teachers[0].text[20] = case.student.image[3] / case.student.image[3].norm()
    _judge(case, 10)


def test_a_well_matched_batch_keeps_its_small_loss_and_gradient():
    """Own pairs at cosine 1 and all others near 0: a loss of 3e-17, which 1 - softmax in float32 would call 0."""
    matched = torch.eye(8)
    pair = Batch(matched, matched, torch.tensor(40.0), torch.tensor(0.0))
    case = Case("interactive", pair, (pair,))
    expected = torch.log1p(7 * torch.exp(torch.tensor(-40.0, dtype=torch.float64)))
    outcome = measure(case, backend="chunked", chunk=3)
    assert abs(outcome.kd - expected) < 1e-5 * expected
    assert abs(outcome.scale + 2.5 * expected) < 1e-4 * expected


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_identical_rows_give_uniform_softmaxes(backend):
    one = batch(1, 48, 100)
    same = Batch(*(tensor.expand(40, -1).contiguous() for tensor in one[:2]), *one[2:])
    outcome = measure(Case("interactive", same, (same,)), backend=backend)
    assert abs(outcome.kd - torch.tensor(40.0).double().log()) < 1e-5
    assert outcome.image.norm() < 1e-4
    assert outcome.scale.abs() < 1e-6


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"backend": "chunked", "chunk": 2}, {"backend": "chunked", "chunk": 5}], ids=str)
def test_gradients_match_finite_differences(options):
    case = make("interactive", 5, 3, 6.0, [(3, 4.0, 0.0)], dtype=torch.float64)
    leaves = Batch(*(tensor.double().requires_grad_() for tensor in case.student))
    assert torch.autograd.gradcheck(lambda *some: 1.5 * forward(case, Batch(*some, leaves.bias), **options).kd, tuple(leaves[:3]))


@pytest.mark.gpu
@EACH_DTYPE
@EACH_CASE
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_loss_and_gradients_match_float64_on_cuda(case, dtype, backend):
    *shape, chunk = case
    device = _case(*shape, dtype).to("cuda")
    outcomes = {"eager": measure(device, backend="eager"), backend: measure(device, backend=backend, chunk=chunk)}
    judge(device.to("cpu"), outcomes, MARGIN, MARGIN, halves=True)
