"""`attention` against float64 formulas and the authors' code, on unlike widths and grids, and through a student's own tower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.models.grids import on_grid
from megakd.models.heads import ModelShape
from megakd.models.patches import Patches, Weights
from megakd.models.student import embeddings
from megakd.objectives.attention import AttentionHead, activation_map
from megakd.objectives.cost import LossShape
from megakd.objectives.set import ObjectiveSet
from megakd.planning.memory_tracker import MemoryTracker
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from support.features import draw, embeddings_with

# Legend: B images, h x w a grid of patches, V of them, C a block's width.
CPU = torch.device("cpu")
TEACHER = ("teacher.model=ViT-B-32", "teacher.pretrained=random", "objectives.contrastive=0", "objectives.attention=1")
LOSSES = ("squared", "norm", "kl")


def _recipe(recipe_file: Path, *overrides: str) -> Recipe:
    return recipes.load(str(recipe_file), (*TEACHER, *overrides))[0]


def _shape(block: Patches) -> ModelShape:
    return ModelShape(4, {-2: block})


def _loss(objectives: ObjectiveSet, own_BhwC: Tensor, *others: Tensor) -> Tensor:
    """Of the student's tokens through its heads, as a step computes it."""
    shapes = [_shape(Patches(part.shape[1] * part.shape[2], part.shape[3], (part.shape[1], part.shape[2]))) for part in (own_BhwC, *others)]
    outputs = {"image": draw(1, 3, 4), "text": draw(2, 3, 4), "scale": torch.tensor(1.0)}
    for key, head in objectives.heads(shapes[0], shapes[1:]).items():
        made = head.project(outputs["image"], outputs["text"], {-2: own_BhwC})
        outputs |= {f"{key}.{name}": value for name, value in made.items()}
    return objectives.losses(embeddings(outputs), [embeddings_with(**{"patches__-2": other}) for other in others])["attention"]


def _reference(own_BhwC: Tensor, other_BhwC: Tensor, loss: str) -> Tensor:
    """By a loop over images and patches, in float64."""
    found = []
    for own_hwC, other_hwC in zip(own_BhwC.double(), other_BhwC.double(), strict=True):
        own, other = ([token @ token for token in part.flatten(0, 1)] for part in (own_hwC, other_hwC))
        if loss == "kl":
            found.append(sum((b / sum(other)) * ((b / sum(other)) / (a / sum(own))).log() for a, b in zip(own, other, strict=True)))
            continue
        own, other = ([value / torch.stack(part).norm() for value in part] for part in (own, other))
        square = sum((a - b) ** 2 for a, b in zip(own, other, strict=True))
        found.append(square if loss == "squared" else square.sqrt())
    return torch.stack(found).mean()


@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_its_formula_whatever_the_widths_and_so_is_its_gradient(recipe_file: Path, loss: str) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file, f"attention.loss={loss}"), CPU, None)
    own, other = draw(3, 3, 2, 4, 6).requires_grad_(), draw(4, 3, 2, 4, 9)
    found = _loss(objectives, own, other)
    wanted = _reference(exact := own.detach().double().requires_grad_(), other, loss)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    found.backward(torch.tensor(2.5))
    wanted.backward(torch.tensor(2.5, dtype=torch.float64))
    assert own.grad is not None
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_squared_is_the_authors_code_times_the_number_of_patches(recipe_file: Path) -> None:
    """`at` and `at_loss` of szagoruyko/attention-transfer, on (B, C, h, w)."""
    own, other = draw(3, 3, 2, 4, 6), draw(4, 3, 2, 4, 9)
    own_BV, other_BV = (F.normalize(part.permute(0, 3, 1, 2).pow(2).mean(1).view(3, -1)) for part in (own, other))
    theirs = (own_BV - other_BV).pow(2).mean()
    found = _loss(ObjectiveSet(_recipe(recipe_file), CPU, None), own, other)
    torch.testing.assert_close(found, 2 * 4 * theirs)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_that_is_its_teacher_loses_nothing_and_has_a_finite_gradient(recipe_file: Path, loss: str) -> None:
    same = draw(3, 3, 2, 4, 6).requires_grad_()
    found = _loss(ObjectiveSet(_recipe(recipe_file, f"attention.loss={loss}"), CPU, None), same, same.detach())
    assert found.item() == pytest.approx(0, abs=1e-6)
    found.backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()
    assert same.grad.norm() < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_maps_of_zeros_and_in_bf16_stay_finite(recipe_file: Path, loss: str) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file, f"attention.loss={loss}"), CPU, None)
    own = (300 * draw(3, 3, 2, 4, 6)).bfloat16().requires_grad_()  # squares beyond what float16 holds
    found = _loss(objectives, own, torch.zeros(3, 2, 4, 6, dtype=torch.bfloat16))
    found.backward()
    assert found.isfinite()
    assert own.grad is not None
    assert own.grad.isfinite().all()
    none = torch.zeros(3, 2, 4, 6, requires_grad=True)
    found = _loss(objectives, none, draw(4, 3, 2, 4, 6))
    found.backward()
    assert found.isfinite()
    assert none.grad is not None
    assert none.grad.isfinite().all()


def test_maps_are_made_on_each_towers_own_grid_and_then_brought_to_the_smaller_one(recipe_file: Path) -> None:
    """Tokens that cancel each other in a mean are strong where they stand, and so is the map."""
    objectives = ObjectiveSet(_recipe(recipe_file), CPU, None)
    fine, coarse = draw(3, 3, 4, 8, 6), draw(4, 3, 2, 4, 9)
    small = on_grid(activation_map(fine), (2, 4))
    own_BV, other_BV = (F.normalize(part.flatten(1)) for part in (small, coarse.square().sum(-1)))
    wanted = (own_BV - other_BV).square().sum(1).mean()
    torch.testing.assert_close(_loss(objectives, fine, coarse), wanted)
    torch.testing.assert_close(_loss(objectives, coarse, fine), wanted)
    tokens_first = F.normalize(on_grid(fine, (2, 4)).square().sum(-1).flatten(1))
    assert (tokens_first - other_BV).square().sum(1).mean() != pytest.approx(wanted.item(), rel=0.05)


def test_blocks_are_averaged_in_pairs_and_teachers_by_their_weights(recipe_file: Path) -> None:
    second = ("ensemble.second.model=ViT-B-32", "ensemble.second.pretrained=random", "ensemble.second.weight=3")
    own, others = draw(3, 3, 2, 4, 6), [draw(4, 3, 2, 4, 6), draw(5, 3, 4, 8, 9)]
    parts = [_loss(ObjectiveSet(_recipe(recipe_file), CPU, None), own, other) for other in others]
    found = _loss(ObjectiveSet(_recipe(recipe_file, *second), CPU, None), own, *others)
    torch.testing.assert_close(found, (parts[0] + 3 * parts[1]) / 4)
    pairs = ObjectiveSet(_recipe(recipe_file, "attention.blocks=[0, -1]", "attention.teacher_blocks=[3, -2]"), CPU, None)
    student = embeddings_with(attention__0=activation_map(own), attention__1=activation_map(2 - own))
    teacher = embeddings_with(**{"patches__3": others[0], "patches__-2": others[1]})
    again = [_loss(ObjectiveSet(_recipe(recipe_file), CPU, None), *two) for two in ((own, others[0]), (2 - own, others[1]))]
    torch.testing.assert_close(pairs.losses(student, [teacher])["attention"], (again[0] + again[1]) / 2)


@pytest.mark.parametrize(
    ("student", "teacher", "told"),
    [
        (Patches(8, 8, (2, 4)), Patches(16, 12, (4, 4)), r"attention\.blocks: the student's grid of 2 x 4 .* of 4 x 4 have unlike aspects"),
        (Patches(8, 8, (2, 4)), Patches(17, 12, None), r"attention\.blocks: the teacher's 17 patch tokens form no grid"),
    ],
)
def test_grids_that_do_not_fit_are_one_message(recipe_file: Path, student: Patches, teacher: Patches, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ObjectiveSet(_recipe(recipe_file), CPU, None).heads(_shape(student), [_shape(teacher)])


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("attention.loss=mse",), r"attention\.loss"),
        (("attention.blocks=[-1, -1]",), r"blocks = \[-1, -1\]: name each block once"),
        (
            ("teacher.store=somewhere", "attention.map=weights"),
            r"attention\.map = 'weights': teacher\.store holds no attention; set it to 'activation'",
        ),
        (("attention.map=softmax",), r"attention\.map"),
        (("teacher.store=somewhere",), r"objectives\.attention: reads the teacher's patch tokens, and teacher\.store holds embeddings"),
    ],
)
def test_bad_settings_are_one_message_each(recipe_file: Path, sets: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ObjectiveSet(_recipe(recipe_file, *sets), CPU, None)


def test_attention_weights_are_those_of_the_last_block_where_none_is_named(recipe_file: Path) -> None:
    recipe = _recipe(recipe_file, "attention.map=weights")
    assert recipe.attention.blocks == [-1]
    assert recipe.teacher_blocks() == {}  # of patch tokens, which a store may hold
    assert _recipe(recipe_file).attention.blocks == [-2]
    named = ObjectiveSet(
        _recipe(recipe_file, "attention.map=weights", "attention.blocks=[0, 3]", "attention.teacher_blocks=[5, -1]"), CPU, None
    )
    assert list(named.student_blocks) == [Weights(0), Weights(3)]
    assert list(named.teacher_blocks) == [Weights(5), Weights(-1)]


@pytest.mark.parametrize("loss", LOSSES)
def test_attention_weights_are_compared_as_they_are(recipe_file: Path, loss: str) -> None:
    """Between grids too; a number whose squares are the reference's tokens stands for a softmax. One that came to 0 is no infinity."""
    objectives = ObjectiveSet(_recipe(recipe_file, "attention.map=weights", f"attention.loss={loss}"), CPU, None)
    own, other = draw(3, 3, 2, 4, 1).abs().requires_grad_(), draw(4, 3, 2, 4, 1).abs()
    found = objectives.losses(embeddings_with(attention__0=own), [embeddings_with(**{"attention__-1": other})])["attention"]
    exact = own.detach().double().requires_grad_()
    wanted = _reference(exact.sqrt(), other.double().sqrt(), loss)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    found.backward(torch.tensor(2.5))
    wanted.backward(torch.tensor(2.5, dtype=torch.float64))
    assert own.grad is not None
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    head = AttentionHead([(Weights(-1), Weights(-1))], *(ModelShape(4, {Weights(-1): Patches(v * v, 1, (v, v))}) for v in (4, 2)))
    fine = draw(5, 3, 4, 4, 1).abs()
    torch.testing.assert_close(head.project(own, own, {Weights(-1): fine})["0"], on_grid(fine, (2, 2)))
    vanished = other.clone()
    vanished[:, 0] = 0
    student = embeddings_with(attention__0=vanished.requires_grad_())
    found = objectives.losses(student, [embeddings_with(**{"attention__-1": other})])["attention"]
    found.backward()
    assert found.isfinite()
    assert vanished.grad is not None
    assert vanished.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_planner_counts_what_the_loss_holds(recipe_file: Path, dtype: torch.dtype) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file), CPU, None)
    other, own = draw(4, 64, 16, 16, 48).to(dtype), activation_map(draw(3, 64, 8, 8, 24)).requires_grad_()
    with MemoryTracker("cpu") as watch:
        watch.ignore([own, other])
        objectives.losses(embeddings_with(attention__0=own), [embeddings_with(**{"patches__-2": other})])["attention"].backward()
    models = _shape(Patches(64, 24, (8, 8))), _shape(Patches(256, 48, (16, 16)))
    shape = LossShape(64, 1, (4, 4), (dtype.itemsize, dtype.itemsize), 1, False, CPU, models)
    assert objectives.cost(shape).memory == pytest.approx(watch.peak, rel=0.1)
