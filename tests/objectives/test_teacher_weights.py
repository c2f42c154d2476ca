"""Scale and weight of each teacher, and a temperature of its own: what the losses become, and what a run makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.models.embeddings import Embeddings
from megakd.objectives.base import StepContext
from megakd.objectives.set import ObjectiveSet, build
from megakd.recipe import Objectives, Recipe
from megakd.recipe import load as recipes
from megakd_kernels.reference import sigmoid_kd_reference, similarity_kd_reference
from support.runs import ENSEMBLE, KD, TEACHER, curve, train

# Legend: B pairs, D embedding width.
B = 13
CPU = torch.device("cpu")
UPSTREAM = 2.5
WEIGHTS = (0.5, 1.5)


def _recipe(recipe_file: Path, *overrides: str) -> Recipe:
    return recipes.load(str(recipe_file), overrides)[0]


def _alone(*names: str) -> list[str]:
    return [f"objectives.{name}={float(name in names)}" for name in Objectives.model_fields]


def _pair(seed: int, width: int, scale: float = 20.0, *, bias: float | None = None, trained: bool = False) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(B, width, generator=generator), dim=-1) for _ in range(2))
    tensors = [image, text, torch.tensor(scale), *([] if bias is None else [torch.tensor(bias)])]
    return Embeddings(*(tensor.requires_grad_(trained) for tensor in tensors))


def _student() -> Embeddings:
    return _pair(1, 16, bias=-4.0, trained=True)


def _teachers() -> list[Embeddings]:
    return [_pair(5, 24, bias=-3.0), _pair(7, 20, 35.0, bias=-6.0)]


def _gradients(loss: Tensor, student: Embeddings) -> list[Tensor]:
    return list(torch.autograd.grad(UPSTREAM * loss, (student.image, student.text, student.scale)))


def test_the_mean_of_teachers_of_equal_weight_has_the_bits_of_a_plain_mean() -> None:
    losses = [torch.tensor(value) for value in (0.1, 1 / 3, 2.7)]
    for weights in ((), (1.0,) * 3, (0.3,) * 3):
        assert torch.equal(StepContext(_student(), weights=weights).mean(losses), torch.stack(losses).mean())
    found = StepContext(_student(), weights=(1.0, 2.0, 5.0)).mean(losses)
    torch.testing.assert_close(found, (losses[0] + 2 * losses[1] + 5 * losses[2]) / 8)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("first", ["contrastive", "sigmoid_contrastive"])
def test_weighted_losses_of_the_whole_matrix_and_their_gradients_are_those_of_float64(recipe_file: Path, first: str, backend: str) -> None:
    """The hard loss of the same logits counts once, whatever the number of teachers."""
    second = first.replace("contrastive", "similarity")
    (objective,) = build(_recipe(recipe_file, *_alone(first, second), f"kernels.backend={backend}"), CPU)
    student, teachers = _student(), _teachers()
    found = objective(StepContext(student, teachers, weights=WEIGHTS))
    exact = Embeddings(*(tensor.detach().double().requires_grad_() for tensor in student[:4]))
    if first == "contrastive":
        parts = [similarity_kd_reference(exact, teacher, hard=True) for teacher in teachers]
    else:
        parts = [sigmoid_kd_reference(exact, [teacher], hard=True) for teacher in teachers]
    kd = sum(weight / sum(WEIGHTS) * part.kd for weight, part in zip(WEIGHTS, parts, strict=True))
    for loss, expected in ((found[second], kd), (found[first], parts[0].hard)):
        torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    mine, true = _gradients(found[second] + found[first], student), _gradients(kd + parts[0].hard, exact)
    for ours, theirs in zip(mine, true, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("own", "other"), [(2.0, 0.5), (0.7, 3.0)])
def test_the_teachers_temperature_sharpens_its_targets_and_the_students_multiplies(recipe_file: Path, own: float, other: float) -> None:
    """t^2 / 2 of both ways' KL(softmax(b / u) || softmax(a / t))."""
    settings = (f"similarity.temperature={own}", f"similarity.teacher_temperature={other}")
    (objective,) = build(_recipe(recipe_file, *_alone("similarity"), *settings), CPU)
    student, teacher = _student(), _pair(5, 24, 30.0)
    exact = Embeddings(*(tensor.detach().double().requires_grad_() for tensor in student[:3]))
    a = exact.scale * exact.image @ exact.text.T / own
    b = teacher.scale.double() * teacher.image.double() @ teacher.text.double().T / other
    ways = [F.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True, reduction="batchmean") for x, y in ((a, b), (a.T, b.T))]
    expected, found = own**2 * (ways[0] + ways[1]) / 2, objective(StepContext(student, [teacher]))["similarity"]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(_gradients(found, student), _gradients(expected, exact), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-6)


def test_at_large_temperatures_the_students_own_does_not_change_the_size_of_the_gradient(recipe_file: Path) -> None:
    """Why t^2 multiplies: the slope at the logits tends to those of a and (t / u) b, each less its line's mean, whatever t is."""
    student, teacher = _student(), _pair(5, 24, 30.0)
    norms = []
    for own in (200.0, 400.0):
        settings = (f"similarity.temperature={own}", f"similarity.teacher_temperature={own / 2}")
        (objective,) = build(_recipe(recipe_file, *_alone("similarity"), *settings), CPU)
        norms.append(float(_gradients(objective(StepContext(student, [teacher]))["similarity"], student)[0].norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_equal_temperatures_have_the_bits_of_one_for_both(recipe_file: Path) -> None:
    losses = []
    for settings in (("similarity.temperature=0.7",), ("similarity.temperature=0.7", "similarity.teacher_temperature=0.7")):
        (objective,) = build(_recipe(recipe_file, *_alone("similarity"), *settings), CPU)
        losses.append(objective(StepContext(_student(), _teachers()))["similarity"])
    assert torch.equal(*losses)


def test_a_scale_of_the_recipe_replaces_the_teachers_own_for_every_objective(recipe_file: Path) -> None:
    settings = (*_alone("similarity", "sigmoid_similarity"), *TEACHER, *ENSEMBLE)
    student, (first, second) = _student(), _teachers()
    told = ObjectiveSet(_recipe(recipe_file, *settings, "ensemble.second.scale=60"), CPU, None)
    untold = ObjectiveSet(_recipe(recipe_file, *settings), CPU, None)
    scaled = untold.losses(student, [first, second._replace(scale=torch.tensor(60.0))])
    assert told.losses(student, [first, second]) == scaled
    assert scaled["similarity"] != untold.losses(student, [first, second])["similarity"]
    assert scaled["sigmoid_similarity"] != untold.losses(student, [first, second])["sigmoid_similarity"]


def test_a_teacher_of_weight_zero_is_not_loaded_and_the_run_says_so(recipe_file: Path, tmp_path: Path) -> None:
    short = (*KD, "optim.steps=3", "similarity.temperature=2.0")
    without = train(recipe_file, "--out", tmp_path / "without", sets=short)
    left_out = train(recipe_file, "--out", tmp_path / "left_out", sets=(*short, *ENSEMBLE, "ensemble.second.weight=0"))
    assert (without.code, left_out.code) == (0, 0), left_out.err
    assert "not loaded, as their weight is 0: ensemble.second" in left_out.out
    assert curve(tmp_path / "left_out") == curve(tmp_path / "without")
    shown = train(recipe_file, "--dry_run", sets=(*short, *ENSEMBLE, "ensemble.second.weight=0"))
    assert "not loaded, as their weight is 0: ensemble.second" in shown.out
    assert "ensemble.second:" not in shown.out
    weighted = train(recipe_file, "--dry_run", sets=(*short, *ENSEMBLE, "ensemble.second.weight=3"))
    assert "shares of the teachers in each loss of the first step: teacher 0.25, ensemble.second 0.75" in weighted.out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            (*ENSEMBLE, "teacher.weight=0", "ensemble.second.weight=0"),
            "teacher.weight = 0, ensemble.second.weight = 0: no teacher has a weight",
        ),
        (("teacher.weight=0",), "teacher.weight = 0: no teacher has a weight; give one a weight above 0, or take [teacher] out"),
        (("teacher.weight=2",), "teacher.weight: weights are normalised over the teachers, and [teacher] is the only one; take it out"),
        (("schedules.teacher.weight={ shape = 'linear', end = 2.0 }",), "teacher.weight: weights are normalised over the teachers"),
        (
            ("teacher.scale=70", "objectives.similarity=0", "objectives.feature=1", "objectives.patch=1"),
            "teacher.scale: objectives.{feature, patch} read embeddings and patches alone, and no teacher's scale; take it out",
        ),
        (("teacher.weight=-1",), "teacher.weight = -1: Input should be greater than or equal to 0"),
        (("teacher.scale=0",), "teacher.scale = 0"),
        (("teacher.scale=1e30",), "teacher.scale = 1e+30"),
        (("teacher.scale=warm",), "teacher.scale = 'warm'"),
        (("similarity.teacher_temperature=0",), "similarity.teacher_temperature = 0: Input should be greater than 0"),
    ],
)
def test_a_mistaken_scale_weight_or_temperature_is_one_message(recipe_file: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match="recipe") as caught:
        _recipe(recipe_file, *TEACHER, *settings)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_a_run_does_not_go_on_with_another_scale_or_weight(recipe_file: Path) -> None:
    old = _recipe(recipe_file, *KD, *ENSEMBLE)
    for change in ("teacher.scale=70", "ensemble.second.weight=2", "similarity.teacher_temperature=2"):
        (line,) = recipes.refused(old, _recipe(recipe_file, *KD, *ENSEMBLE, change))
        assert line.startswith(change.partition("=")[0])
