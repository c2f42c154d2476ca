"""How `feature` and `interactive` bring the student to the teacher's space, and at which scale `interactive` compares."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from megakd.models.embeddings import Embeddings
from megakd.models.heads import Head, ModelShape
from megakd.objectives.base import StepContext
from megakd.objectives.set import ObjectiveSet, build
from megakd.recipe import Recipe, Student
from megakd.recipe import load as recipes

B = 12
CPU = torch.device("cpu")
PROJECTED = ("interactive", "cross", "feature", "masked_feature")


def _recipe(recipe_file: Path, *overrides: str) -> Recipe:
    return recipes.load(str(recipe_file), ("teacher.model=ViT-B-32", "objectives.contrastive=0", *overrides))[0]


def _head(recipe_file: Path, name: str, widths: tuple[int, int], *overrides: str) -> Head:
    (objective,) = build(_recipe(recipe_file, f"objectives.{name}=1", *overrides), CPU)
    head = objective.head(*map(ModelShape, widths))
    assert isinstance(head, Head)
    return head


def _pair(seed: int, width: int) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    rows = (F.normalize(torch.randn(B, width, generator=generator), dim=-1) for _ in range(2))
    return Embeddings(*rows, torch.tensor(20.0))


@pytest.mark.parametrize("name", PROJECTED)
def test_unless_the_recipe_says_more_a_student_of_the_teachers_width_is_compared_as_it_is(recipe_file: Path, name: str) -> None:
    head, student = _head(recipe_file, name, (16, 16)), _pair(1, 16)
    outputs = head.project(student.image, student.text, {})
    assert list(head.parameters()) == []
    torch.testing.assert_close(outputs["image"], student.image)
    torch.testing.assert_close(outputs["text"], student.text)
    linear = _head(recipe_file, name, (16, 24))
    assert {key: tuple(value.shape) for key, value in linear.state_dict().items()} == {"image.weight": (24, 16), "text.weight": (24, 16)}


@pytest.mark.parametrize("name", PROJECTED)
def test_no_head_between_unlike_widths_is_refused_with_both_and_the_remedy(recipe_file: Path, name: str) -> None:
    message = rf"^{name}\.head = 'none': the student's embeddings have 16 numbers and the teacher's 24; set {name}\.head to 'linear' or"
    with pytest.raises(ValueError, match=message):
        _head(recipe_file, name, (16, 24), f"{name}.head=none")
    assert _head(recipe_file, name, (16, 16), f"{name}.head=mlp").summary == "mlp 16 -> 16"


def test_the_first_lines_name_the_head_of_each_objective_and_teacher(recipe_file: Path) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file, *(f"objectives.{name}=1" for name in PROJECTED), "feature.head=mlp"), CPU, None)
    shapes = [ModelShape(16), ModelShape(16), ModelShape(24)]
    said = "interactive none, interactive1 linear 16 -> 24, cross none, cross1 linear 16 -> 24, feature mlp 16 -> 16, feature1 mlp 16 -> 24"
    said += ", masked_feature none, masked_feature1 linear 16 -> 24"
    assert objectives.outline(shapes[0], shapes[1:]) == said
    assert ObjectiveSet(_recipe(recipe_file, "objectives.similarity=1"), CPU, None).outline(shapes[0], shapes[1:]) == ""


def test_feature_without_a_head_is_the_squared_distance_of_the_embeddings_themselves(recipe_file: Path) -> None:
    student, teacher = _pair(1, 16), _pair(5, 16)
    inputs = [student.image.double().requires_grad_(), student.text.double().requires_grad_()]
    head = _head(recipe_file, "feature", (16, 16))
    outputs = head.project(*inputs, {})
    (objective,) = build(_recipe(recipe_file, "objectives.feature=1"), CPU)
    context = StepContext(student._replace(projected={"feature": (outputs["image"], outputs["text"])}), [teacher])
    found = torch.autograd.grad(2.5 * objective(context)["feature"], inputs)
    own = [F.normalize(rows, dim=-1) for rows in inputs]
    distances = [(rows - taught.double()).square().sum(1).mean() for rows, taught in zip(own, (teacher.image, teacher.text), strict=True)]
    expected = torch.autograd.grad(2.5 * sum(distances) / 2, inputs)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["student", "own", "50.0", "7"])
def test_interactive_compares_at_the_scale_that_the_recipe_says(recipe_file: Path, scale: str) -> None:
    sets = ("objectives.interactive=1", f"interactive.scale={scale}")
    (objective,), teacher, student = build(_recipe(recipe_file, *sets), CPU), _pair(5, 16), _pair(1, 16)
    head = objective.head(ModelShape(16), ModelShape(16))
    assert head is not None
    learned = student.scale.clone().requires_grad_()
    outputs = head.project(student.image, student.text, {})
    assert ("scale" in outputs) is (scale == "own")
    assert [name for name, _ in head.named_parameters()] == ["log_scale"] * (scale == "own")
    features = {"interactive.scale": outputs["scale"]} if scale == "own" else {}
    projected = {"interactive": (outputs["image"], outputs["text"])}
    loss = objective(StepContext(student._replace(scale=learned, projected=projected, features=features), [teacher]))["interactive"]
    by = {"student": 20.0, "own": 1 / 0.07}.get(scale) or float(scale)
    labels = torch.arange(B)
    ways = [
        F.cross_entropy(by * query @ among.T, labels) for query, among in ((student.image, teacher.text), (student.text, teacher.image))
    ]
    torch.testing.assert_close(loss, (ways[0] + ways[1]) / 2)
    if loss.requires_grad:
        loss.backward()
    assert (learned.grad is not None) is (scale == "student")
    assert all(parameter.grad is not None and parameter.grad.abs() > 0 for parameter in head.parameters())


@pytest.mark.parametrize("scale", ["0.0", "-3", "teacher", "true", "2e6"])
def test_another_scale_is_refused_in_one_line(recipe_file: Path, scale: str) -> None:
    with pytest.raises(ValueError, match=r"interactive\.scale = .*: give 'student', 'own' or a number above 0") as refused:
        _recipe(recipe_file, f"interactive.scale={scale}")
    assert len(str(refused.value).splitlines()) == 2


def test_an_own_scale_starts_at_the_students_bound_where_that_is_lower(recipe_file: Path) -> None:
    head = _head(recipe_file, "interactive", (16, 16), "interactive.scale=own", "student.max_scale=5.0")
    assert Student.model_fields["max_scale"].default == 100.0
    assert head.project(torch.ones(2, 16), torch.ones(2, 16), {})["scale"].item() == pytest.approx(5.0)
    with torch.no_grad():
        head.log_scale.fill_(math.log(9.0))
    assert head.project(torch.ones(2, 16), torch.ones(2, 16), {})["scale"].item() <= 5.0
