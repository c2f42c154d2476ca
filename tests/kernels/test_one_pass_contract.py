"""What `interactive_kd` and `sigmoid_kd` promise besides numbers: errors, which gradients flow; and memory and repeatability of all."""

from __future__ import annotations

import pytest
import torch

from megakd_kernels import interactive_kd, sigmoid_kd, two_pass_torch
from support.loss_cases import INTERPRETED, Batch, Case, Watch, batch, forward, measure
from support.one_pass_cases import LOSSES, make

STUDENT, TEACHER, WIDE = batch(37, 48, 50, -10, seed=1), batch(37, 48, 80, -12, seed=2), batch(37, 64, 80, -12, seed=3)
CASES = {
    "interactive": Case("interactive", STUDENT, (TEACHER,)),
    "sigmoid": Case("sigmoid", STUDENT, (TEACHER, WIDE)),
    "similarity": Case("similarity", STUDENT, (WIDE,)),
}
BOTH = pytest.mark.parametrize("loss", LOSSES)
# Each loss with options of each backend that it has here, similarity at a temperature and without.
EVERY_LOSS = pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((loss, options) for loss in LOSSES for options in ({"backend": "eager"}, {"backend": "chunked", "chunk": 10})),
        *(("similarity", {"backend": "eager", "temperature": temperature}) for temperature in (1.0, 2.0)),
        *(("similarity", {"backend": "chunked", "chunk": 10, "temperature": temperature}) for temperature in (1.0, 2.0)),
        pytest.param("similarity", {"backend": "triton", "chunk": 10, "temperature": 2.0}, marks=INTERPRETED),
    ],
    ids=str,
)
EVERY_BACKEND = pytest.mark.parametrize("options", [{"backend": "eager"}, {"backend": "chunked", "chunk": 10}], ids=lambda o: o["backend"])


@BOTH
@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({}, {"backend": "trition"}, "unknown backend 'trition'"),
        ({}, {"chunk": 0}, "chunk must be at least 1"),
        ({}, {"chunk": 8, "backend": "eager"}, "takes no chunk"),
        ({}, {"ring": True, "backend": "eager"}, "no ring"),
        ({"text": STUDENT.text[1:]}, {}, r"student.image \(37, 48\), student.text \(36, 48\)"),
        ({"image": STUDENT.image[1:], "text": STUDENT.text[1:]}, {}, r"same pairs, got student.image \(36, 48\).*\(37, 48\)"),
        ({"scale": torch.ones(2)}, {}, r"student.scale must hold one number, got shape \(2,\)"),
        ({"text": STUDENT.text.long()}, {}, "floating point: student.text is torch.int64"),
    ],
)
def test_faulty_requests_name_what_is_wrong(loss, changed, options, message):
    with pytest.raises(ValueError, match=message):
        forward(CASES[loss], STUDENT._replace(**changed), **options)


def test_interactive_names_both_widths_where_they_differ():
    with pytest.raises(ValueError, match="got 48 and 64: project the student"):
        interactive_kd(STUDENT, WIDE)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (STUDENT._replace(bias=torch.ones(2)), TEACHER, r"student.bias must hold one floating point number, got shape \(2,\)"),
        (STUDENT, TEACHER._replace(bias=torch.tensor(1)), r"teacher.bias .* torch.int64"),
        (STUDENT, [], "list of teachers is empty"),
        (STUDENT, [TEACHER, batch(36, 64, 80)], r"teacher\[1\].image \(36, 64\)"),
    ],
)
def test_sigmoid_names_faulty_biases_and_teachers(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        sigmoid_kd(student, teacher)


@BOTH
@EVERY_BACKEND
def test_losses_are_float32_scalars_whose_gradients_have_the_inputs_dtype(loss, options):
    leaves = Batch(*(tensor.bfloat16() for tensor in STUDENT)).leaves()
    found = forward(CASES[loss], leaves, **options)
    assert found.kd.dtype == torch.float32
    assert found.kd.shape == ()
    found.kd.backward()
    assert leaves.image.grad.dtype == leaves.text.grad.dtype == leaves.scale.grad.dtype == torch.bfloat16


@EVERY_BACKEND
def test_parts_not_asked_for_are_zero_without_a_gradient(options):
    leaves = STUDENT.leaves()
    for loss, part in [(sigmoid_kd(leaves, TEACHER, **options), "hard"), (sigmoid_kd(leaves, None, hard=True, **options), "kd")]:
        assert getattr(loss, part) == 0
        assert not getattr(loss, part).requires_grad
        assert all(each.requires_grad == (name != part) for name, each in loss._asdict().items())
    assert [float(each) for each in sigmoid_kd(leaves, None, **options)] == [0.0, 0.0]


@EVERY_BACKEND
def test_a_bias_of_none_counts_as_zero(options):
    absent, zero = STUDENT.leaves(), STUDENT._replace(bias=torch.tensor(0.0)).leaves()
    losses = [sigmoid_kd(leaves, TEACHER._replace(bias=leaves.bias), hard=True, **options) for leaves in (absent._replace(bias=None), zero)]
    for loss in losses:
        (loss.kd + loss.hard).backward()
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))
    assert torch.equal(absent.image.grad, zero.image.grad)


@BOTH
@EVERY_BACKEND
@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 0, 0), (0, 1, 1, 0), (1, 0, 0, 1)])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(loss, options, wanted):
    if loss == "interactive" and wanted[3]:
        wanted = (*wanted[:3], 0)
    whole, some = STUDENT.leaves(), STUDENT.leaves()
    for leaf, want in zip(some, wanted, strict=True):
        leaf.requires_grad_(bool(want))
    for leaves in (whole, some):
        found = forward(CASES[loss], leaves, **options)
        if any(leaf.requires_grad for leaf in leaves[: 3 + (loss == "sigmoid")]):
            (found.kd + found.hard).backward()
        else:
            assert not found.kd.requires_grad
    for leaf, want, gradient in zip(some, wanted, whole.gradients(), strict=True):
        assert torch.equal(leaf.grad, gradient) if want else leaf.grad is None


@EVERY_BACKEND
@pytest.mark.parametrize("part", ["kd", "hard"])
def test_each_part_can_be_differentiated_alone(options, part):
    together, alone = STUDENT.leaves(), STUDENT.leaves()
    getattr(sigmoid_kd(together, TEACHER, hard=True, **options), part).backward()
    getattr(sigmoid_kd(alone, TEACHER if part == "kd" else None, hard=part == "hard", **options), part).backward()
    for ours, expected in zip(together.gradients(), alone.gradients(), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-7)


@BOTH
@EVERY_BACKEND
def test_a_backward_pass_can_be_repeated(loss, options):
    leaves = STUDENT.leaves()
    kd = forward(CASES[loss], leaves, **options).kd
    first, second = (torch.autograd.grad(kd, leaves[:3], retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@BOTH
@EVERY_BACKEND
def test_the_teacher_gets_no_gradient(loss, options):
    case = CASES[loss]._replace(teachers=tuple(teacher.leaves() for teacher in CASES[loss].teachers))
    forward(case, STUDENT.leaves(), **options).kd.backward()
    assert all(teacher.gradients() == [None] * 4 for teacher in case.teachers)


@EVERY_BACKEND
def test_numbers_of_one_element_keep_their_shape(options):
    scale, bias = (torch.tensor([number], requires_grad=True) for number in (50.0, -10.0))
    sigmoid_kd(STUDENT._replace(scale=scale, bias=bias), TEACHER, **options).kd.backward()
    assert scale.grad.shape == bias.grad.shape == (1,)


@EVERY_LOSS
def test_autocast_changes_nothing(loss, options):
    plain = measure(CASES[loss], **options)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = STUDENT.leaves()
        found = forward(CASES[loss], leaves, **options)
    (2.5 * found.kd + 1.25 * found.hard).backward()
    assert torch.equal(found.kd.detach().double(), plain.kd)
    assert torch.equal(leaves.image.grad.double(), plain.image)


@EVERY_LOSS
def test_two_runs_give_the_same_bits(loss, options):
    first, second = (measure(CASES[loss], **options) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("loss", CASES)
def test_a_second_derivative_is_refused_where_it_would_be_wrong(loss):
    leaves = STUDENT.leaves()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(forward(CASES[loss], leaves, backend="chunked").kd, leaves.image, create_graph=True)
    (gradient,) = torch.autograd.grad(forward(CASES[loss], leaves, backend="eager").kd, leaves.image, create_graph=True)
    assert gradient.requires_grad


@pytest.mark.slow
@BOTH
def test_the_compiled_backend_computes_what_eager_does(loss):
    compiled, eager = (measure(CASES[loss], backend=backend) for backend in ("compiled", "eager"))
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(compiled, eager, strict=True))


@pytest.mark.parametrize(
    ("loss", "options"), [*((loss, {}) for loss in LOSSES), *(("similarity", {"temperature": temperature}) for temperature in (1.0, 2.0))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_chunked_backend_never_holds_more_than_a_panel(loss, options, dtype, monkeypatch):
    """Two passes hold tiles, and of the logits what the embeddings take: or 64 MB where those are less, which are taken away here."""
    monkeypatch.setattr(two_pass_torch, "LEAST_KEPT", 0)
    pairs, chunk, width = 600, 32, 16
    case = make(loss, pairs, width, 50, [(width, 80, -12)], dtype=dtype)
    with Watch() as watch:
        measure(case, backend="chunked", chunk=chunk, **options)
    if loss == "similarity":
        assert watch.elements <= 2 * pairs * 2 * width
    else:
        assert watch.elements == chunk * pairs
    with Watch() as watch:
        measure(case, backend="eager", **options)
    assert watch.elements == pairs * pairs  # the recorder does see a whole matrix where there is one


@pytest.mark.parametrize(
    ("loss", "hard", "wanted", "products"),
    [
        ("interactive", False, "image text scale", 4),
        ("interactive", False, "image", 3),
        ("interactive", False, "", 2),
        ("sigmoid", False, "image text scale bias", 5),
        ("sigmoid", True, "image text scale bias", 7),
        ("sigmoid", True, "text", 5),
        ("sigmoid", True, "bias", 3),
        ("sigmoid", True, "", 3),
    ],
)
def test_one_pass_forms_each_matrix_once_and_multiplies_only_for_wanted_gradients(loss, hard, wanted, products):
    """Two teachers for the sigmoid loss: 3 products of logits, then 2 a part."""
    leaves = STUDENT.leaves()
    for name, leaf in leaves._asdict().items():
        leaf.requires_grad_(name in wanted.split())
    with Watch() as watch:
        found = forward(CASES[loss]._replace(hard=hard), leaves, backend="chunked")
        if wanted:
            (found.kd + found.hard).backward()
    assert watch.products == products


@BOTH
def test_no_products_for_gradients_where_autograd_is_off(loss):
    with Watch() as trained:
        forward(CASES[loss], STUDENT.leaves(), backend="chunked")
    with Watch() as judged, torch.no_grad():
        forward(CASES[loss], STUDENT.leaves(), backend="chunked")
    assert judged.products < trained.products
