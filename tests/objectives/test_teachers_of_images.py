"""Objectives whose teachers see images alone: `feature` without texts, and losses of texts by the other teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.models import clip
from megakd.models.embeddings import Embeddings
from megakd.models.heads import ModelShape
from megakd.objectives.cost import LossShape
from megakd.objectives.set import ObjectiveSet
from megakd.recipe import Teacher
from megakd.recipe import load as recipes
from support.runs import TEACHER

# Legend: B pairs, D embedding width.
B, CPU = 6, torch.device("cpu")
SEES_ALONE = ("ensemble.seen.model=timm:vit_tiny_patch16_224", "ensemble.seen.pretrained=random")
STUDENT, CLIP, IMAGES = ModelShape(16), ModelShape(24), ModelShape(20, has_text=False)


def objectives(recipe_file: Path, *active: str, more: tuple[str, ...] = ()) -> ObjectiveSet:
    weights = ["objectives.contrastive=0", *(f"objectives.{name}=1.0" for name in active)]
    return ObjectiveSet(recipes.load(str(recipe_file), [*TEACHER, *SEES_ALONE, *weights, *more])[0], CPU, None)


def rows(seed: int, width: int) -> Tensor:
    return F.normalize(torch.randn(B, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def of_clip(seed: int, width: int) -> Embeddings:
    return Embeddings(rows(seed, width), rows(seed + 1, width), torch.tensor(20.0))


def of_images(seed: int, width: int) -> Embeddings:
    return Embeddings(rows(seed, width), rows(seed, width)[:, :0], torch.tensor(float("nan")))


def clip_and_images(recipe_file: Path) -> tuple[clip.ModelSpec, list[clip.ModelSpec]]:
    """The student, and the teachers of the recipe of `objectives`."""
    recipe = recipes.load(str(recipe_file), [*TEACHER, *SEES_ALONE])[0]
    assert recipe.student is not None
    return clip.resolve(recipe.student, "student"), [clip.resolve(settings, role) for role, settings in recipe.teachers().items()]


@pytest.mark.parametrize("name", ["feature", "masked_feature"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_feature_of_a_teacher_without_texts_is_the_distance_of_the_images_and_learns_from_it_alone(
    name: str, kind: str, recipe_file: Path
) -> None:
    teacher, image_BD, text_BD = of_images(5, 20), rows(1, 16).float(), rows(2, 16).float()
    part = objectives(recipe_file, name, more=(f"{name}.head={kind}",))
    head = part.heads(STUDENT, [IMAGES])[name]
    assert not any("text" in key for key in head.state_dict())
    image_BD.requires_grad_()
    text_BD.requires_grad_()
    outputs = head.project(image_BD, text_BD, {})
    student = Embeddings(image_BD, text_BD, torch.tensor(20.0), projected={name: (outputs["image"], outputs["text"])})
    (loss,) = part.losses(student, [teacher]).values()
    (2.5 * loss).backward()
    wanted_BD = image_BD.detach().double().requires_grad_()
    expected = (F.normalize(head.double().image(wanted_BD), dim=-1) - teacher.image).square().sum() / B  # type: ignore[operator]
    (2.5 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert image_BD.grad is not None
    assert wanted_BD.grad is not None
    torch.testing.assert_close(image_BD.grad.double(), wanted_BD.grad, rtol=1e-4, atol=1e-6)
    assert text_BD.grad is None or not text_BD.grad.any()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_losses_of_texts_are_those_of_the_teachers_that_have_texts(order: tuple[int, int], recipe_file: Path) -> None:
    names = ("similarity", "interactive", "dist", "dkd", "standardised", "rkd")
    part = objectives(recipe_file, "contrastive", "feature", *names)
    shapes, teachers = [CLIP, IMAGES], [of_clip(5, 24), of_images(7, 20)]
    shapes, teachers = ([both[place] for place in order] for both in (shapes, teachers))  # type: ignore[assignment]
    heads = part.heads(STUDENT, shapes)
    assert sorted(heads) == ["feature", "feature1", "interactive"]
    student = of_clip(1, 16)
    student = student._replace(image=student.image.float(), text=student.text.float())
    outputs = {name: head.project(student.image, student.text, {}) for name, head in heads.items()}
    student = student._replace(projected={name: (found["image"], found["text"]) for name, found in outputs.items()})
    found = part.losses(student, teachers)
    alone = part.losses(student._replace(projected={"interactive": student.projected["interactive"], "feature": student.projected[
        f"feature{order.index(0) or ''}"]}), [of_clip(5, 24)])  # fmt: skip
    for name in (*names, "contrastive"):
        torch.testing.assert_close(found[name], alone[name], rtol=0, atol=0)
    image_BD, _ = student.projected[f"feature{order.index(1) or ''}"]
    of_image = (image_BD - teachers[order.index(1)].image).square().sum(1).mean()
    torch.testing.assert_close(found["feature"].double(), (alone["feature"].double() + of_image) / 2, rtol=1e-5, atol=1e-6)


def test_relations_between_images_need_no_texts(recipe_file: Path) -> None:
    part = objectives(recipe_file, "rkd", more=("rkd.on=image",))
    assert part.of_texts == []
    student = of_clip(1, 16)
    found = part.losses(student, [of_images(7, 20)])["rkd"]
    torch.testing.assert_close(found, part.losses(student, [of_clip(7, 20)])["rkd"], rtol=0, atol=0)
    assert found > 0


def test_costs_of_losses_of_texts_are_of_the_teachers_that_have_texts(recipe_file: Path) -> None:
    part = objectives(recipe_file, "similarity")
    both = LossShape(64, 2, (16, 44), (4, 4), 2, False, CPU, (STUDENT, CLIP, IMAGES))
    alone = LossShape(64, 2, (16, 24), (4, 4), 1, False, CPU, (STUDENT, CLIP))
    assert part.cost(both) == part.cost(alone)
    assert objectives(recipe_file, "feature").cost(both) != objectives(recipe_file, "feature").cost(alone)


@pytest.mark.parametrize("name", ["similarity", "sigmoid_similarity", "interactive", "gradient", "dist", "dkd", "standardised", "rkd"])
def test_an_objective_of_texts_without_a_teacher_that_has_them_is_refused_by_name(name: str, recipe_file: Path) -> None:
    part = objectives(recipe_file, name, "feature")
    student = clip.resolve(recipes.load(str(recipe_file), [])[0].student, "student")  # type: ignore[arg-type]
    seen = clip.resolve(Teacher(model="timm:vit_tiny_patch16_224", pretrained="random"), "teacher")
    with pytest.raises(ValueError, match=rf"objectives.{name}: compares the student's texts with a teacher's, and teacher \(timm:vit_tiny"):
        part.shapes(student, [seen])
    shapes = objectives(recipe_file, "contrastive", "feature", "patch", more=("patch.blocks=[-1]",)).shapes(student, [seen])
    assert [shape.has_text for shape in shapes] == [True, False]
    assert shapes[1].width == 192


def test_the_only_teacher_with_texts_keeps_a_weight_in_each_step(recipe_file: Path) -> None:
    """Its share of a loss of texts is all of it, whatever its weight, so 0 would not switch the loss off."""
    fading = "schedules.teacher.weight={ shape = 'linear', end = 0.0, to_step = 4 }"
    student, teachers = clip_and_images(recipe_file)
    with pytest.raises(ValueError, match=r"schedules: at step 4 the weight of teacher is 0, and no other teacher has texts for .*dkd"):
        objectives(recipe_file, "dkd", "feature", more=(fading,)).shapes(student, teachers)
    assert len(objectives(recipe_file, "feature", more=(fading,)).shapes(student, teachers)) == 3
    to_the_end = fading.replace("to_step = 4", "from_step = 4")  # which comes after the last step
    assert len(objectives(recipe_file, "dkd", more=(to_the_end,)).shapes(student, teachers)) == 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_head_that_reads_its_teacher_is_given_the_one_that_it_was_made_for(order: tuple[int, int], recipe_file: Path) -> None:
    part = objectives(recipe_file, "augmented_feature", "feature")
    shapes, teachers = [CLIP, IMAGES], [of_clip(5, 24), of_images(7, 20)]
    heads, given = part.heads(STUDENT, [shapes[place] for place in order]), part.by_head([teachers[place] for place in order])
    assert sorted(heads) == sorted(given) == ["augmented_feature", "feature", "feature1"]
    assert heads["augmented_feature"].teacher_width == given["augmented_feature"][1].image.shape[1] == 24
