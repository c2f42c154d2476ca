"""Objectives over the similarity matrix against themselves written out in float64, in panels and whole, down to a batch of one pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.models.embeddings import Embeddings
from megakd.objectives.base import StepContext
from megakd.objectives.set import ObjectiveSet
from megakd.planning.models import describe
from megakd.recipe import load as recipes
from megakd.recipe.objectives import declaration
from megakd_kernels import panels
from support import matrix_objectives as references
from support.loss_cases import Watch
from support.matrix_objectives import CPU, called, gradients, measure, objective, pairs, trained

# Legend: N pairs, D width.
N = 14
# Options that are not the defaults, and the same for the reference.
OPTIONS = {
    "dist": ({"temperature": 1.7, "beta": 0.6, "gamma": 1.9}, references.dist),
    "dkd": ({"temperature": 2.3, "alpha": 1.4, "beta": 5.0}, references.dkd),
    "standardised": ({"temperature": 1.3}, references.standardised),
    "gradient": ({}, references.gradient),
}
BY_LINE = list(OPTIONS)
WAYS = {"whole": ["kernels.backend=eager"], "panels": ["kernels.backend=chunked"]}
WITH_PANELS = pytest.mark.parametrize("way", WAYS)
EACH = pytest.mark.parametrize("name", BY_LINE)


def _width(name: str) -> int:
    """Of a teacher: unlike the student's 6 where it may be."""
    return 6 if declaration(name).one_width else 9


def _settings(name: str) -> list[str]:
    return [f"{name}.{key}={value}" for key, value in OPTIONS[name][0].items()]


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lines of 14 float64 numbers, so that the last panel has two; six of float32."""
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", 3 * N * 8)


def _close(found: Tensor, true: Tensor, tolerance: float) -> None:
    assert (found.double() - true.double()).norm() <= tolerance * max(true.double().norm(), 1e-3), (found, true)


@WITH_PANELS
@EACH
@pytest.mark.usefixtures("small_panels")
def test_value_and_gradient_are_those_of_the_formula_in_float64(recipe_file: Path, name: str, way: str) -> None:
    options, reference = OPTIONS[name]
    student, teachers = pairs(N, 6, 12.0, 1), [pairs(N, 6, 25.0, 2), pairs(N, _width(name), 40.0, 3)]
    true = measure(lambda own, taught: sum(reference(own, each, **options) for each in taught) / len(taught), student, teachers)
    found = measure(called(objective(str(recipe_file), name, *WAYS[way], *_settings(name))), student, teachers)
    _close(found.loss, true.loss, 1e-10)
    for ours, expected in zip(found.gradients, true.gradients, strict=True):
        _close(ours, expected, 1e-9)
    assert name == "standardised" or true.gradients[2].abs() > 1e-4


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("name", [name for name in BY_LINE if "temperature" in OPTIONS[name][0]])
def test_panels_are_formed_again_at_the_temperature_of_their_own_step(recipe_file: Path, name: str) -> None:
    """Also where the objective has been called for another step before the backward pass."""
    moving = f'schedules.{name}.temperature={{ shape = "linear", end = 3.0, to_step = 4 }}'
    scheduled = objective(str(recipe_file), name, f"{name}.temperature=1.0", moving, *WAYS["panels"])
    student, teacher = trained(pairs(N, 6, 12.0, 1)), pairs(N, 9, 25.0, 2)
    (early,), (_late,) = (scheduled(StepContext(student, [teacher], step=step)).values() for step in (2, 5))
    (2.5 * early).backward()
    alone = objective(str(recipe_file), name, f"{name}.temperature=2.0", *WAYS["panels"])
    for found, expected in zip(gradients(student), measure(called(alone), student, [teacher]).gradients, strict=True):
        assert torch.equal(found, expected)


@EACH
def test_the_gradient_is_the_slope_of_the_value(recipe_file: Path, name: str) -> None:
    """Of the objective itself, by central differences, so no derivative of torch's is believed."""
    student, teacher, loss = (
        pairs(N, 6, 12.0, 1),
        pairs(N, _width(name), 25.0, 2),
        called(objective(str(recipe_file), name, *_settings(name))),
    )
    generator = torch.Generator().manual_seed(4)
    steps = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 1e-5 for tensor in student[:3]]
    ends = [Embeddings(*(old + way * step for old, step in zip(student[:3], steps, strict=True))) for way in (1, -1)]
    ahead, behind = (loss(end, [teacher]) for end in ends)
    slope = sum((gradient * step).sum() for gradient, step in zip(measure(loss, student, [teacher]).gradients, steps, strict=True)) / 2.5
    assert ((ahead - behind) / 2 - slope).abs() < 1e-5 * slope.abs()


@WITH_PANELS
@EACH
@pytest.mark.usefixtures("small_panels")
def test_float32_and_bf16_embeddings_give_a_float32_loss(recipe_file: Path, name: str, way: str) -> None:
    """Of bf16 embeddings it is the loss of those very numbers: the products are float32's."""
    options, reference = OPTIONS[name]
    loss = called(objective(str(recipe_file), name, *WAYS[way], *_settings(name)))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        student, teacher = pairs(N, 6, 12.0, 1, dtype), pairs(N, _width(name), 25.0, 2, dtype)
        found = measure(loss, student, [teacher])
        doubled = [Embeddings(*(tensor.double() for tensor in model[:3])) for model in (student, teacher)]
        true = measure(lambda own, taught: reference(own, taught[0], **options), doubled[0], doubled[1:])
        assert found.loss.dtype == torch.float32
        _close(found.loss, true.loss, 1e-5)
        for ours, expected in zip(found.gradients, true.gradients, strict=True):
            assert ours.dtype == dtype
            _close(ours, expected, tolerance)


@WITH_PANELS
@EACH
@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("count", [1, 2, N])
def test_a_student_that_is_its_teacher_has_a_loss_of_exactly_zero(recipe_file: Path, name: str, way: str, count: int) -> None:
    teacher = pairs(count, 6, 60.0, 2, torch.float32)
    assert measure(called(objective(str(recipe_file), name, *WAYS[way])), teacher, [teacher]).loss == 0


@EACH
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_one_and_two_pairs_and_equal_embeddings_have_finite_gradients(recipe_file: Path, name: str, scale: float) -> None:
    loss = called(objective(str(recipe_file), name))
    for count in (1, 2, 5):
        student, teacher = pairs(count, 6, scale, 1, torch.float32), pairs(count, _width(name), scale, 2, torch.float32)
        constant = student._replace(image=student.image[:1].repeat(count, 1), text=student.text[:1].repeat(count, 1))
        for own, taught in ((student, teacher), (constant, teacher), (student, constant), (constant, constant)):
            outcome = measure(loss, own, [taught])
            assert all(torch.isfinite(tensor).all() for tensor in (outcome.loss, *outcome.gradients))
            if count == 1:
                assert outcome.loss < 1e-6  # 0 but for `gradient`, whose two softmaxes come from two products
                assert all(gradient.abs().max() < 1e-6 for gradient in outcome.gradients)


@EACH
def test_a_very_sure_student_has_a_finite_loss_and_gradient(recipe_file: Path, name: str) -> None:
    """Logits up to 2000: their softmaxes have no float32 but 0 and 1."""
    student, teacher = pairs(5, 6, 2000.0, 1, torch.float32), pairs(5, 6, 2000.0, 2, torch.float32)
    settings = [f"{name}.temperature=1.0"] if "temperature" in OPTIONS[name][0] else []
    outcome = measure(called(objective(str(recipe_file), name, *settings)), student, [teacher])
    assert all(torch.isfinite(tensor).all() for tensor in (outcome.loss, *outcome.gradients))
    assert outcome.loss > 0.1


@EACH
def test_no_tensor_holds_the_matrix_where_it_is_formed_in_panels(recipe_file: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    count, width = 96, 8
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", 7 * count * 4)
    student, teacher = pairs(count, width, 12.0, 1, torch.float32), pairs(count, width, 25.0, 2, torch.float32)
    largest = {}
    for way, settings in WAYS.items():
        with Watch() as watch:
            measure(called(objective(str(recipe_file), name, *settings)), student, [teacher])
        largest[way] = watch.elements
    assert largest == {"whole": count**2, "panels": count * width}


def test_dist_is_the_published_code_without_its_epsilon(recipe_file: Path) -> None:
    """Which adds 1e-8 to the product of both norms: a student that is its teacher then has a loss, and small columns count less."""

    def published(student_NN: Tensor, teacher_NN: Tensor, epsilon: float) -> Tensor:
        def uncorrelated(a_NN: Tensor, b_NN: Tensor) -> Tensor:
            a_NN, b_NN = (each - each.mean(1, keepdim=True) for each in (a_NN, b_NN))
            return 1 - ((a_NN * b_NN).sum(1) / (a_NN.norm(dim=1) * b_NN.norm(dim=1) + epsilon)).mean()

        p_NN, q_NN = student_NN.softmax(1), teacher_NN.softmax(1)
        return uncorrelated(p_NN, q_NN) + uncorrelated(p_NN.T, q_NN.T)

    student, teacher = pairs(N, 6, 100.0, 1), pairs(N, 6, 100.0, 2)
    a_NN, b_NN = (model.scale * model.image @ model.text.T for model in (student, teacher))
    found = called(objective(str(recipe_file), "dist"))
    _close(found(student, [teacher]), (published(a_NN, b_NN, 0.0) + published(a_NN.T, b_NN.T, 0.0)) / 2, 1e-10)
    assert found(teacher, [teacher]) == 0
    assert published(b_NN, b_NN, 1e-8) > 1e-7


def test_dkd_is_the_published_code_until_that_takes_the_logarithm_of_zero(recipe_file: Path) -> None:
    def published(student_NN: Tensor, teacher_NN: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
        own_NN = torch.eye(len(student_NN), dtype=student_NN.dtype)

        def halves(logits_NN: Tensor) -> Tensor:
            p_NN = (logits_NN / temperature).softmax(1)
            return torch.stack([(p_NN * own_NN).sum(1), (p_NN * (1 - own_NN)).sum(1)], 1)

        target = F.kl_div(halves(student_NN).log(), halves(teacher_NN), reduction="sum")
        p_NN, q_NN = (logits_NN / temperature - 1000 * own_NN for logits_NN in (student_NN, teacher_NN))
        others = F.kl_div(p_NN.log_softmax(1), q_NN.softmax(1), reduction="sum")
        return (alpha * target + beta * others) * temperature**2 / len(student_NN)

    options = OPTIONS["dkd"][0]
    for scale, fits in ((20.0, True), (2000.0, False)):
        student, teacher = pairs(N, 6, scale, 1, torch.float32), pairs(N, 6, scale, 2, torch.float32)
        a_NN, b_NN = (model.scale * model.image @ model.text.T for model in (student, teacher))
        theirs = (published(a_NN, b_NN, **options) + published(a_NN.T, b_NN.T, **options)) / 2
        ours = called(objective(str(recipe_file), "dkd", *_settings("dkd")))(student, [teacher])
        assert torch.isfinite(ours)
        assert torch.isfinite(theirs) == fits
        if fits:
            _close(ours, theirs, 1e-5)


def test_standardised_is_the_published_code_but_for_the_deviation_over_n(recipe_file: Path) -> None:
    """Theirs divides the square by N - 1, which is another temperature, t * sqrt(N / (N - 1)) of ours, and adds 1e-7."""
    temperature = 1.3

    def published(student_NN: Tensor, teacher_NN: Tensor) -> Tensor:
        p_NN, q_NN = ((a - a.mean(-1, keepdim=True)) / (1e-7 + a.std(-1, keepdim=True)) / temperature for a in (student_NN, teacher_NN))
        return F.kl_div(p_NN.log_softmax(1), q_NN.softmax(1), reduction="batchmean") * temperature**2

    student, teacher = pairs(N, 6, 20.0, 1), pairs(N, 6, 50.0, 2)
    a_NN, b_NN = (model.scale * model.image @ model.text.T for model in (student, teacher))
    theirs = (published(a_NN, b_NN) + published(a_NN.T, b_NN.T)) / 2
    ratio = (N / (N - 1)) ** 0.5
    ours = called(objective(str(recipe_file), "standardised", f"standardised.temperature={temperature * ratio}"))(student, [teacher])
    _close(ours / ratio**2, theirs, 1e-5)


def test_gradient_is_made_of_the_published_ones_which_pass_through_a_tensor_of_n_d_n(recipe_file: Path) -> None:
    """Each direction's are those of the published code, whose second is a sum over N x D x N products; the mean of both is compared."""

    def published(anchors_ND: Tensor, others_ND: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        slope_NN = (scale * anchors_ND @ others_ND.T).softmax(1) - torch.eye(N, dtype=torch.float64)
        repeated_NDN = slope_NN.T.repeat(1, anchors_ND.shape[1]).view(N, anchors_ND.shape[1], N)
        return slope_NN @ others_ND * scale / N, (repeated_NDN * (scale * anchors_ND.T)[None]).sum(-1) / N

    def of_infonce(model: Embeddings) -> list[Tensor]:
        (by_image, by_text), (by_text_back, by_image_back) = (
            published(*sides, model.scale) for sides in ((model.image, model.text), (model.text, model.image))
        )
        return [(by_image + by_image_back) / 2, (by_text + by_text_back) / 2]

    student, teacher = pairs(N, 16, 20.0, 1), pairs(N, 16, 50.0, 2)
    with Watch() as watch:
        theirs = [of_infonce(model) for model in (student, teacher)]
    assert watch.elements == N * 16 * N
    squares = [(N * (own_ND - taught_ND)).square().sum(1).mean() for own_ND, taught_ND in zip(*theirs, strict=True)]
    with Watch() as watch:
        ours = called(objective(str(recipe_file), "gradient"))(student, [teacher])
    assert watch.elements == N * 16
    _close(ours, sum(squares) / 2, 1e-12)


def test_gradient_is_refused_for_towers_of_unlike_width(recipe_file: Path) -> None:
    """The student of the recipe has 16 numbers, ViT-B-32 has 512."""
    for name, fits in (("dist", True), ("gradient", False)):
        recipe = recipes.load(str(recipe_file), [f"objectives.{name}=1.0", "teacher.model=ViT-B-32"])[0]
        student, teacher = (describe(settings, role) for role, settings in (("student", recipe.student), ("teacher", recipe.teacher)))
        objectives = ObjectiveSet(recipe, CPU, None)
        assert len(objectives.shapes(student, [replace(student, role="teacher")])) == 2
        if fits:
            assert [shape.width for shape in objectives.shapes(student, [teacher])] == [student.width, 512]
            continue
        with pytest.raises(
            ValueError, match=rf"objectives\.gradient: .* {student.width} numbers where those of teacher have 512; .*weight to 0"
        ):
            objectives.shapes(student, [teacher])


def test_standardised_is_the_same_at_every_logit_scale(recipe_file: Path) -> None:
    loss, student, teacher = called(objective(str(recipe_file), "standardised")), pairs(N, 6, 20.0, 1), pairs(N, 6, 50.0, 2)
    outcome = measure(loss, student, [teacher])
    assert loss(student._replace(scale=student.scale * 3), [teacher._replace(scale=teacher.scale * 7)]) == outcome.loss
    assert outcome.gradients[2] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dist.beta=0.0", "dist.gamma=0.0"], r"dist.*beta and gamma are both 0.*objectives\.dist to 0"),
        (["dkd.alpha=0.0", "dkd.beta=0.0"], r"dkd.*alpha and beta are both 0.*objectives\.dkd to 0"),
        (["standardised.temperature=0.0"], r"standardised\.temperature = 0"),
    ],
)
def test_options_that_compare_nothing_are_refused(recipe_file: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        objective(str(recipe_file), "dist", *settings)
