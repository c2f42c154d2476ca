"""Each objective against torch's own functions, and where its gradients go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakd import recipe_files
from megakd.models.embeddings import Embeddings
from megakd.objectives.registry import REGISTRY
from megakd.recipe import Recipe
from megakd.tasks.distill import Distill

# Legend: B pairs, D embedding width.
B = 12


def _recipe(recipe_file: Path, *overrides: str) -> Recipe:
    return recipe_files.load(str(recipe_file), overrides)[0]


def _unit(seed: int, width: int) -> Tensor:
    return F.normalize(torch.randn(B, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _pair(seed: int, width: int, scale: float = 20.0, *, trained: bool = False) -> Embeddings:
    tensors = (_unit(seed, width), _unit(seed + 1, width), torch.tensor(scale))
    return Embeddings(*(tensor.requires_grad_(trained) for tensor in tensors))


def _at_cosine(target_BD: Tensor, cosine: float) -> Tensor:
    """Unit rows at one angle to those of `target_BD`."""
    other_BD = torch.randn(target_BD.shape, generator=torch.Generator().manual_seed(9))
    across_BD = F.normalize(other_BD - (other_BD * target_BD).sum(-1, keepdim=True) * target_BD, dim=-1)
    return cosine * target_BD + (1 - cosine**2) ** 0.5 * across_BD


def test_contrastive_is_torchs_cross_entropy_both_ways(recipe_file: Path) -> None:
    student = _pair(1, 16, trained=True)
    logits = student.scale * student.image @ student.text.T
    labels = torch.arange(B)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    found = REGISTRY["contrastive"](_recipe(recipe_file))(student, None, None)
    torch.testing.assert_close(found, expected)
    inputs = (student.image, student.text, student.scale)
    for mine, torchs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_similarity_is_torchs_kl_of_rows_and_columns(recipe_file: Path, temperature: float) -> None:
    student, teacher = _pair(1, 16), _pair(5, 24, scale=30.0)
    a = student.scale * student.image @ student.text.T / temperature
    b = teacher.scale * teacher.image @ teacher.text.T / temperature
    ways = [F.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True, reduction="batchmean") for x, y in ((a, b), (a.T, b.T))]
    found = REGISTRY["similarity"](_recipe(recipe_file, f"similarity.temperature={temperature}"))(student, teacher, None)
    torch.testing.assert_close(found, temperature**2 * (ways[0] + ways[1]) / 2)


def test_similarity_of_a_student_that_is_its_teacher_is_zero(recipe_file: Path) -> None:
    teacher = _pair(3, 16)
    assert REGISTRY["similarity"](_recipe(recipe_file))(teacher, teacher, None).item() == 0.0


def test_a_fixed_student_scale_replaces_the_learned_one_and_gives_it_no_gradient(recipe_file: Path) -> None:
    student, teacher = _pair(1, 16, scale=20.0, trained=True), _pair(5, 16)
    fixed = REGISTRY["similarity"](_recipe(recipe_file, "similarity.student_scale=50"))(student, teacher, None)
    fixed.backward()
    assert student.scale.grad is None
    assert student.image.grad is not None
    learned = REGISTRY["similarity"](_recipe(recipe_file))
    torch.testing.assert_close(fixed, learned(student._replace(scale=torch.tensor(50.0)), teacher, None))
    learned(student, teacher, None).backward()
    assert student.scale.grad is not None
    assert student.scale.grad.abs() > 0


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("width", [8, 64, 1024])
def test_feature_is_two_minus_two_cosines_at_every_width(recipe_file: Path, width: int, cosine: float) -> None:
    teacher = _pair(5, width)
    projected = {"feature": (_at_cosine(teacher.image, cosine), _at_cosine(teacher.text, cosine))}
    found = REGISTRY["feature"](_recipe(recipe_file))(_pair(1, 16)._replace(projected=projected), teacher, None)
    assert found.item() == pytest.approx(2 - 2 * cosine, abs=1e-5)


@pytest.mark.parametrize(("kind", "tensors"), [("linear", 2), ("mlp", 8)])
def test_the_feature_head_projects_to_the_teachers_width_and_learns(recipe_file: Path, kind: str, tensors: int) -> None:
    objective = REGISTRY["feature"](_recipe(recipe_file, f"feature.head={kind}"))
    head = objective.head(16, 24)
    assert head is not None
    student, teacher = _pair(1, 16, trained=True), _pair(5, 24)
    projected = {"feature": (F.normalize(head.image(student.image), dim=-1), F.normalize(head.text(student.text), dim=-1))}
    objective(student._replace(projected=projected), teacher, None).backward()
    gradients = [parameter.grad for parameter in head.parameters()]
    assert len(gradients) == tensors
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert student.image.grad is not None
    assert student.image.grad.abs().sum() > 0


@pytest.mark.parametrize("name", REGISTRY)
def test_the_teacher_gets_no_gradient(recipe_file: Path, name: str) -> None:
    student, teacher = _pair(1, 16, trained=True), _pair(5, 16, trained=False)
    student = student._replace(projected={"feature": (student.image, student.text)})
    loss = REGISTRY[name](_recipe(recipe_file))(student, teacher, None)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    loss.backward()
    assert all(tensor.grad is None for tensor in (teacher.image, teacher.text, teacher.scale))


def test_the_task_weighs_what_it_logs_unweighted(recipe_file: Path) -> None:
    recipe = _recipe(recipe_file, "objectives.similarity=3", "objectives.feature=0.5", "teacher.model=ViT-B-32")
    task = Distill(recipe, None)
    student, teacher = _pair(1, 16), _pair(5, 16)
    losses = task.losses(student._replace(projected={"feature": (student.image, student.text)}), teacher)
    assert set(losses) == {"contrastive", "similarity", "feature"}
    torch.testing.assert_close(task.total(losses), losses["contrastive"] + 3 * losses["similarity"] + 0.5 * losses["feature"])


def test_an_objective_of_weight_zero_is_left_out_with_its_head(recipe_file: Path) -> None:
    task = Distill(_recipe(recipe_file, "objectives.feature=0.0"), None)
    assert not task.needs_teacher
    assert task.heads(16, 24) == {}
    assert set(task.losses(_pair(1, 16), None)) == {"contrastive"}


def test_an_objective_that_needs_a_teacher_is_refused_without_one(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"objectives\.similarity, objectives\.feature: needs a teacher.*\[teacher\]"):
        Distill(_recipe(recipe_file, "objectives.similarity=1", "objectives.feature=1"), None)
