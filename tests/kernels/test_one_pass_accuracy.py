"""`interactive_kd` and `sigmoid_kd` by every backend against float64: right by themselves, and no worse than eager."""

from __future__ import annotations

import pytest
import torch

from support.loss_cases import EPS, Batch, Case, batch, errors, forward, measure, measure_reference
from support.one_pass_cases import CASES, LOSSES, MARGIN, case_of, judge, make, rounding

EACH_CASE = pytest.mark.parametrize(
    ("loss", "shape"), [pytest.param(loss, shape, id=f"{loss}-{'-'.join(map(str, shape))}") for loss in LOSSES for shape in CASES[loss]]
)
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EACH_STEP = pytest.mark.parametrize(
    "options", [{"backend": "eager"}, {"backend": "chunked", "chunk": 2}, {"backend": "chunked", "chunk": 5}], ids=str
)


def judge_chunked(case: Case, chunk: int) -> None:
    judge(case, {"eager": measure(case, backend="eager"), "chunked": measure(case, backend="chunked", chunk=chunk)})


@EACH_DTYPE
@EACH_CASE
def test_losses_and_gradients_match_float64(loss, shape, dtype):
    *shape, chunk = shape
    judge_chunked(case_of(loss, shape, dtype), chunk)


@pytest.mark.parametrize("parts", ["kd", "hard"])
def test_one_part_alone_matches_float64(parts):
    case = case_of("sigmoid", (65, 48, 50, -10, [(32, 80, -12)]))
    judge_chunked(case._replace(hard=False) if parts == "kd" else case._replace(teachers=()), 16)


@pytest.mark.parametrize(("loss", "width"), [("interactive", 48), ("sigmoid", 32)])
def test_a_teacher_in_half_precision_guides_a_student_in_full(loss, width):
    student, teacher = batch(65, 48, 50, -10, seed=1), batch(65, width, 80, -12, torch.bfloat16, seed=2)
    judge_chunked(Case(loss, student, (teacher,)), 16)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_very_large_logit_neither_overflows_nor_drowns_the_rest(loss):
    """Where the student's images meet the texts: the teacher's in the interactive loss, its own in the sigmoid loss."""
    case = case_of(loss, (37, 48, 100) if loss == "interactive" else (37, 48, 100, -10, [(48, 100, -10)]))
    meetings = {"interactive": [(case.student, case.teachers[0])], "sigmoid": [(pair, pair) for pair in (case.student, *case.teachers)]}
    for images, texts in meetings[loss]:
        images.image[3] *= 30.0
        texts.text[20] = images.image[3] / images.image[3].norm()
    judge_chunked(case, 10)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [("interactive", (129, 48, 1500)), ("interactive", (37, 64, 3000)), ("sigmoid", (129, 48, 2000, -10, [(64, 1500, 100)]))],
)
def test_logits_of_thousands_match_float64(loss, shape):
    judge_chunked(case_of(loss, shape), 50)


def test_a_well_matched_batch_keeps_its_small_loss_and_gradient():
    """Positives at cosine 1 and all others near 0: an interactive loss of 3e-17, which 1 - softmax in float32 would call 0."""
    matched = torch.eye(8)
    pair = Batch(matched, matched, torch.tensor(40.0))
    expected = torch.log1p(7 * torch.exp(torch.tensor(-40.0, dtype=torch.float64)))
    outcome = measure(Case("interactive", pair, (pair,)), backend="chunked", chunk=3)
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


@pytest.mark.parametrize("size", [5.0, 80.0, 3000.0])
@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_logits_of_any_size_and_sign_give_a_divergence_exact_to_a_few_of_their_roundings(size, backend):
    """One pair at a time, from equal to opposite: the textbook form loses a size of 1e-4 here, or is infinite less infinite."""
    one = torch.ones(1, 1)
    near = [(size, size), (-size, -size), (size, size - 0.5), (0.5 - size, -size)]
    for a, b in [*near, (size, -size), (-size, size), (0.0, size), (size, 0.0)]:
        student, teacher = (Batch(one, one, torch.tensor(0.0), torch.tensor(bias)) for bias in (a, b))
        case = Case("sigmoid", student, (teacher,))
        truth, outcome = measure_reference(case), measure(case, backend=backend)
        off = errors(outcome, truth)
        assert off.kd <= 2 * EPS * (truth.kd + torch.sigmoid(-torch.tensor(b).abs()) * (1 + abs(a - b))) + 1e-15 * abs(a)
        assert off.hard <= 2 * EPS * truth.hard
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


@EACH_STEP
@pytest.mark.parametrize(
    ("loss", "teachers", "hard"),
    [("interactive", [(3, 4.0, 0.0)], False)]
    + [("sigmoid", [(4, 4.0, -1.0), (3, 8.0, 1.0)][:count], hard) for count, hard in [(1, False), (2, True), (0, True)]],
    ids=["interactive", "one teacher", "two teachers and hard", "hard"],
)
def test_gradients_match_finite_differences(options, loss, teachers, hard):
    case = make(loss, 5, 3, 6.0, teachers, dtype=torch.float64)._replace(hard=hard)
    leaves = Batch(*(tensor.double().requires_grad_() for tensor in case.student._replace(bias=torch.tensor(-2.0))))
    used = leaves[: 3 if loss == "interactive" else 4]

    def total(*tensors):
        kd, siglip = forward(case, Batch(*tensors, *leaves[len(tensors) :]), **options)
        return 1.5 * kd + 0.5 * siglip

    assert torch.autograd.gradcheck(total, used)


@pytest.mark.gpu
@EACH_DTYPE
@EACH_CASE
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_losses_and_gradients_match_float64_on_cuda(loss, shape, dtype, backend):
    *shape, chunk = shape
    device = case_of(loss, shape, dtype).to("cuda")
    outcomes = {"eager": measure(device, backend="eager"), backend: measure(device, backend=backend, chunk=chunk)}
    judge(device.to("cpu"), outcomes, MARGIN[loss], halves=True)
