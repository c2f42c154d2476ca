"""`sigmoid_kd` by every backend against float64: right by itself, and no worse than eager."""

from __future__ import annotations

import pytest
import torch
from single_pass_cases import Batch, Case, Outcome, batch, errors, forward, judge, make, measure, measure_reference, rounding

# Shares of `rounding` that eager's error, and what the others' errors have beyond it, may reach: about twice the largest seen over the
# cases below on one CPU, 0.86, 0.57, 0.12, 0.11, 0.09, 0.11; beyond eager's 0.03 of the scale's.
MARGIN = Outcome(*(torch.tensor(share) for share in (1.5, 1.2, 0.25, 0.25, 0.2, 0.25)))
EXCESS = Outcome(*(torch.tensor(share) for share in (0.1, 0.1, 0.05, 0.05, 0.06, 0.05)))

# pairs, width, scale, bias, (width, scale, bias) of each teacher, chunk
CASES = [
    (1, 48, 20, -10, [(64, 20, -5)], 1),
    (2, 48, 10, 5, [(64, 50, -20)], 1),
    (37, 48, 100, -20, [(1536, 30, -10)], 37),
    (37, 64, 200, -10, [(48, 200, 0), (64, 1, 5)], 8),
    (129, 512, 1, 0, [(768, 1, -1)], 50),
    (129, 1536, 117, -16.5, [(48, 110, -12.9)], 128),
    (1000, 256, 10, -10, [(64, 112, -16)], 300),
    (1000, 64, 117, -13, [(64, 100, -12), (96, 30, -12)], 999),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _case(pairs: int, width: int, scale: float, bias: float, teachers: list, dtype: torch.dtype = torch.float32) -> Case:
    return make("sigmoid", pairs, width, scale, teachers, bias=bias, dtype=dtype)


def _judge(case: Case, chunk: int) -> None:
    judge(case, {"eager": measure(case, backend="eager"), "chunked": measure(case, backend="chunked", chunk=chunk)}, MARGIN, EXCESS)


@EACH_DTYPE
@EACH_CASE
def test_losses_and_gradients_match_float64(case, dtype):
    *shape, chunk = case
    _judge(_case(*shape, dtype), chunk)


@pytest.mark.parametrize("parts", ["kd", "hard"])
def test_one_part_alone_matches_float64(parts):
    case = _case(65, 48, 50, -10, [(32, 80, -12)])
    _judge(case._replace(hard=False) if parts == "kd" else case._replace(teachers=()), 16)


def test_a_teacher_in_half_precision_guides_a_student_in_full():
    _judge(Case("sigmoid", batch(65, 48, 50, -10, seed=1), (batch(65, 32, 80, -12, torch.bfloat16, seed=2),)), 16)


def test_one_very_large_logit_neither_overflows_nor_drowns_the_rest():
    case = _case(37, 48, 100, -10, [(48, 100, -10)])
    for pair in (case.student, *case.teachers):
        pair.image[3] *= 30.0
        pair.text[20] = pair.image[3] / pair.image[3].norm()
    _judge(case, 10)


@pytest.mark.parametrize("size", [5.0, 80.0, 3000.0])
@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_logits_of_any_size_and_sign_give_a_divergence_exact_to_a_few_of_their_roundings(size, backend):
    """One pair at a time, from equal to opposite: the textbook form loses a size of 1e-4 here, or is infinite less infinite."""
    one = torch.ones(1, 1)
    for a, b in [
        (size, size),
        (-size, -size),
        (size, size - 0.5),
        (0.5 - size, -size),
        (size, -size),
        (-size, size),
        (0.0, size),
        (size, 0.0),
    ]:
        student, teacher = (Batch(one, one, torch.tensor(0.0), torch.tensor(bias)) for bias in (a, b))
        case = Case("sigmoid", student, (teacher,))
        truth, outcome = measure_reference(case), measure(case, backend=backend)
        off = errors(outcome, truth)
        assert off.kd <= 2 * torch.finfo(torch.float32).eps * (
            truth.kd + torch.sigmoid(-torch.tensor(b).abs()) * (1 + abs(a - b))
        ) + 1e-15 * abs(a)
        assert off.hard <= 2 * torch.finfo(torch.float32).eps * truth.hard
        assert off.bias <= 4 * rounding(case).bias


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "bias"), [(117.0, -16.0), (10.0, 5.0), (3000.0, -10.0)])
def test_a_student_equal_to_its_teachers_has_a_divergence_of_exactly_zero(backend, dtype, scale, bias):
    twin = batch(129, 64, scale, bias, dtype)
    options = {"chunk": 37} if backend == "chunked" else {}
    for teachers in ((twin,), (twin, twin), (twin, twin, twin)):
        outcome = measure(Case("sigmoid", twin, teachers, hard=False), backend=backend, **options)
        assert outcome.kd == 0
        assert outcome.image.norm() <= 1e-6 * scale


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"backend": "chunked", "chunk": 2}, {"backend": "chunked", "chunk": 5}], ids=str)
@pytest.mark.parametrize(("teachers", "hard"), [(1, False), (2, True), (0, True)])
def test_gradients_match_finite_differences(options, teachers, hard):
    case = make("sigmoid", 5, 3, 6.0, [(4, 4.0, -1.0), (3, 8.0, 1.0)][:teachers], dtype=torch.float64)._replace(hard=hard)
    leaves = Batch(*(tensor.double().requires_grad_() for tensor in case.student._replace(bias=torch.tensor(-2.0))))

    def total(*tensors):
        kd, siglip = forward(case, Batch(*tensors), **options)
        return 1.5 * kd + 0.5 * siglip

    assert torch.autograd.gradcheck(total, tuple(leaves))


@pytest.mark.gpu
@EACH_DTYPE
@EACH_CASE
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_losses_and_gradients_match_float64_on_cuda(case, dtype, backend):
    *shape, chunk = case
    device = _case(*shape, dtype).to("cuda")
    outcomes = {"eager": measure(device, backend="eager"), backend: measure(device, backend=backend, chunk=chunk)}
    judge(device.to("cpu"), outcomes, MARGIN, MARGIN, halves=True)
