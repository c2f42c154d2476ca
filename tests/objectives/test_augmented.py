"""`augmented_feature`: the fusion head with what it is given of its teacher, and the loss by the formula of CLIP-KD's code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.embeddings import Embeddings
from megakd.models.heads import FusionHead, ModelShape
from megakd.models.student import Student, embeddings
from megakd.objectives.base import StepContext
from megakd.objectives.set import ObjectiveSet
from megakd.recipe import load as recipes
from support.matrix_objectives import CPU, objective, pairs

# Legend: B pairs, D student's width, T teacher's.
B, D, T = 10, 6, 9


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(7, D), nn.Linear(8, D)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, x: Tensor) -> Tensor:
        return self.image(x)

    def encode_text(self, x: Tensor) -> Tensor:
        return self.text(x)


def _student(recipe_file: Path, *overrides: str) -> Student:
    torch.manual_seed(0)
    head = objective(str(recipe_file), "augmented_feature", *overrides).head(ModelShape(D), ModelShape(T))
    assert isinstance(head, FusionHead)
    return Student(Towers(), {"augmented_feature": head}, 100.0)


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(B, 7, generator=generator), torch.randn(B, 8, generator=generator)


def _afd(student: Student, teacher: Embeddings, scale: Tensor) -> Tensor:
    """`afd_loss` of CLIP-KD's loss.py in float64, for widths that differ, with the student's own embedding."""
    image, text = (F.normalize(tower(x), dim=1) for tower, x in zip((student.clip.image, student.clip.text), _inputs64(), strict=True))  # type: ignore[operator]
    head = student.heads["augmented_feature"]
    img_fusion = F.normalize(head.image(torch.cat([image, teacher.image], dim=1)), dim=1)  # type: ignore[operator]
    txt_fusion = F.normalize(head.text(torch.cat([text, teacher.text], dim=1)), dim=1)  # type: ignore[operator]
    logits, labels = scale * img_fusion @ txt_fusion.T, torch.arange(B)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _inputs64() -> tuple[Tensor, Tensor]:
    image, text = _inputs()
    return image.double(), text.double()


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("scale", ["own", "student", "25.0"])
def test_the_loss_is_the_authors_with_the_gradient_of_every_parameter(recipe_file: Path, scale: str, backend: str) -> None:
    student, teacher = _student(recipe_file, f"augmented_feature.scale={scale}"), pairs(B, T, 40.0, 2)
    taught = {"augmented_feature": (teacher.image.float(), teacher.text.float())}
    seen = embeddings(student(*_inputs(), taught))
    built = objective(str(recipe_file), "augmented_feature", f"augmented_feature.scale={scale}", f"kernels.backend={backend}")
    (loss,) = built(StepContext(seen, [teacher])).values()
    assert loss.dtype == torch.float32
    (2.5 * loss).backward()
    reference = _student(recipe_file, f"augmented_feature.scale={scale}").double()
    logarithm = {"own": reference.heads["augmented_feature"], "student": reference.clip}.get(scale)
    by = torch.tensor(25.0) if logarithm is None else getattr(logarithm, "log_scale" if scale == "own" else "logit_scale").exp()
    expected = _afd(reference, teacher, by)
    (2.5 * expected).backward()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    for (name, found), true in zip(student.named_parameters(), reference.parameters(), strict=True):
        assert (found.grad is None) is (true.grad is None), name
        if found.grad is not None and true.grad is not None:
            torch.testing.assert_close(found.grad, true.grad.float(), rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert teacher.image.grad is None


def test_each_head_is_given_its_own_teacher(recipe_file: Path) -> None:
    sets = ("teacher.model=ViT-B-32", "objectives.augmented_feature=1", "objectives.feature=1")
    objectives = ObjectiveSet(recipes.load(str(recipe_file), sets)[0], CPU, None)
    heads = objectives.heads(ModelShape(D), [ModelShape(T), ModelShape(T + 1)])
    assert {name: head.teacher_width for name, head in heads.items() if head.teacher_width} == {
        "augmented_feature": T,
        "augmented_feature1": T + 1,
    }
    teachers = [pairs(B, T, 40.0, 2), pairs(B, T + 1, 40.0, 3)]
    by_head = objectives.by_head(teachers)
    for name, teacher in zip(("augmented_feature", "augmented_feature1"), teachers, strict=True):
        objective_of, own = by_head[name]
        assert objective_of == "augmented_feature"
        assert own is teacher
