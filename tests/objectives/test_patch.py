"""`patch` and `patch_relation` against float64 formulas, their grids and widths, and the statistics that bring teachers to one scale."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.models.grids import on_grid
from megakd.models.heads import ModelShape
from megakd.models.patches import Patches
from megakd.objectives.base import StepContext
from megakd.objectives.patch import PatchHead
from megakd.objectives.set import ObjectiveSet
from megakd.objectives.standardise import Standardiser, hadamard, phi_s
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from support.features import draw, embeddings_with

CPU = torch.device("cpu")
TEACHER = ("teacher.model=ViT-B-32", "teacher.pretrained=random", "objectives.contrastive=0")
WIDE, NARROW = Patches(16, 12, (4, 4)), Patches(16, 8, (4, 4))


def _recipe(recipe_file: Path, *overrides: str) -> Recipe:
    return recipes.load(str(recipe_file), (*TEACHER, *overrides))[0]


def _reference(own: Tensor, other: Tensor, loss: str) -> Tensor:
    """By loops over tokens, in float64; maps (B, h, w, C)."""
    tokens = list(zip(own.double().flatten(0, 2), other.double().flatten(0, 2), strict=True))
    if loss == "cosine":
        return torch.stack([1 - a @ b / (a.norm() * b.norm()) for a, b in tokens]).mean()
    if loss == "mse":
        return torch.stack([((a - b) ** 2).mean() for a, b in tokens]).mean()
    away = torch.stack([(a - b).abs() for a, b in tokens])
    return torch.where(away < 1, away**2 / 2, away - 0.5).mean()


@pytest.mark.parametrize("loss", ["cosine", "mse", "smooth_l1"])
def test_patch_is_its_formula_and_so_is_its_gradient(recipe_file: Path, loss: str) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file, "objectives.patch=1", f"patch.loss={loss}"), CPU, None)
    own, other = draw(3, 3, 2, 4, 6).requires_grad_(), 2 * draw(4, 3, 2, 4, 6)
    found = objectives.losses(embeddings_with(patch__0=own), [embeddings_with(**{"patches__-2": other})])["patch"]
    wanted = _reference(exact := own.detach().double().requires_grad_(), other, loss)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    found.backward(torch.tensor(2.5))
    wanted.backward(torch.tensor(2.5, dtype=torch.float64))
    assert own.grad is not None
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-5, atol=1e-8)


def test_patch_relation_is_its_formula_whatever_the_widths(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of two images and a rest of one."""
    monkeypatch.setattr("megakd.objectives.patch._RELATION_BYTES", 2 * 4 * 8**2)
    objectives = ObjectiveSet(_recipe(recipe_file, "objectives.patch_relation=1"), CPU, None)
    own, other = draw(3, 3, 2, 4, 6).requires_grad_(), draw(4, 3, 2, 4, 9)
    found = objectives.losses(embeddings_with(patch_relation__0=own), [embeddings_with(**{"patches__-2": other})])["patch_relation"]
    exact = own.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(exact.flatten(1, 2), other.double().flatten(1, 2), strict=True):
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        for i in range(8):
            for j in range(8):
                total = total + (a[i] @ a[j] - b[i] @ b[j]) ** 2
    wanted = total / (3 * 8 * 8)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    found.backward(torch.tensor(2.5))
    wanted.backward(torch.tensor(2.5, dtype=torch.float64))
    assert own.grad is not None
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["patch", "patch_relation"])
def test_a_student_that_is_its_teacher_loses_nothing(recipe_file: Path, name: str) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file, f"objectives.{name}=1"), CPU, None)
    same = draw(3, 3, 2, 4, 6)
    student = embeddings_with()._replace(features={f"{name}.0": same})
    assert objectives.losses(student, [embeddings_with(**{"patches__-2": same})])[name].item() == pytest.approx(0, abs=1e-6)


def test_several_blocks_are_compared_in_pairs_and_averaged(recipe_file: Path) -> None:
    sets = ("objectives.patch=1", "patch.blocks=[0, -1]", "patch.teacher_blocks=[3, -2]", "patch.loss=mse")
    objectives = ObjectiveSet(_recipe(recipe_file, *sets), CPU, None)
    own, other = [draw(seed, 3, 2, 2, 6) for seed in (1, 2)], [draw(seed, 3, 2, 2, 6) for seed in (3, 4)]
    student = embeddings_with(patch__0=own[0], patch__1=own[1])
    found = objectives.losses(student, [embeddings_with(**{"patches__3": other[0], "patches__-2": other[1]})])["patch"]
    assert found.item() == pytest.approx((F.mse_loss(own[0], other[0]) + F.mse_loss(own[1], other[1])).item() / 2)
    assert set(objectives.student_blocks) == {0, -1}
    assert set(objectives.teacher_blocks) == {3, -2}


@pytest.mark.parametrize(("kind", "tensors"), [("linear", 1), ("mlp", 4)])
def test_a_head_brings_the_students_tokens_to_the_teachers_width_and_the_smaller_grid(kind: str, tensors: int) -> None:
    fine = Patches(64, 8, (8, 8))
    head = PatchHead(kind, [(-2, -2)], ModelShape(4, {-2: fine}), ModelShape(6, {-2: WIDE}), "patch.blocks")
    own = draw(1, 3, 8, 8, 8).requires_grad_()
    (projected,) = head.project(draw(2, 3, 4), draw(3, 3, 4), {-2: own}).values()
    assert projected.shape == (3, 4, 4, 12)
    projected.sum().backward()
    assert len(list(head.parameters())) == tensors
    assert own.grad is not None
    assert (own.grad != 0).any()


def test_a_finer_grid_of_the_teacher_comes_to_the_students(recipe_file: Path) -> None:
    """A plane is the same plane on every grid but at the borders, where fewer patches are averaged."""
    ramp = torch.arange(8.0)[None, :, None, None].expand(1, 8, 8, 1)
    coarse = on_grid(ramp, (4, 4))
    torch.testing.assert_close(coarse[0, 1:3, 0, 0], torch.tensor([2.5, 4.5]))
    objectives = ObjectiveSet(_recipe(recipe_file, "objectives.patch=1", "patch.loss=mse"), CPU, None)
    teacher = embeddings_with(**{"patches__-2": ramp})
    assert objectives.losses(embeddings_with(patch__0=coarse), [teacher])["patch"].item() == 0.0


@pytest.mark.parametrize(
    ("sets", "student", "teacher", "told"),
    [
        (
            (),
            Patches(8, 8, (2, 4)),
            WIDE,
            r"patch\.blocks: the student's grid of 2 x 4 .* of 4 x 4 have unlike aspects",
        ),
        ((), Patches(17, 8, None), WIDE, r"patch\.blocks: the student's 17 patch tokens form no grid"),
        (("patch.head=none",), NARROW, WIDE, r"patch\.head = 'none': block -2 of the student is 8 wide and block -2 of the teacher 12"),
        (("patch.standardise=phi_s",), NARROW, Patches(16, 10, (4, 4)), r"patch\.standardise = 'phi_s'.*no Hadamard matrix of 10 rows"),
    ],
)
def test_models_that_do_not_fit_are_one_message(
    recipe_file: Path, sets: tuple[str, ...], student: Patches, teacher: Patches, told: str
) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file, "objectives.patch=1", *sets), CPU, None)
    with pytest.raises(ValueError, match=told):
        objectives.heads(ModelShape(4, {-2: student}), [ModelShape(6, {-2: teacher})])


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (("patch.blocks=[-1, -2]", "patch.teacher_blocks=[3]"), r"teacher_blocks = \[3\]: give one for each of blocks = \[-1, -2\]"),
        (("patch.blocks=[-1, -1]",), r"blocks = \[-1, -1\]: name each block once"),
        (("patch.blocks=[]",), r"patch\.blocks"),
    ],
)
def test_blocks_that_are_no_pairs_are_refused_by_the_recipe(recipe_file: Path, sets: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        _recipe(recipe_file, "objectives.patch=1", *sets)


def test_a_store_of_embeddings_has_no_patch_tokens(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"objectives\.patch: reads the teacher's patch tokens, and teacher\.store holds embeddings alone"):
        ObjectiveSet(_recipe(recipe_file, "objectives.patch=1", "teacher.store=somewhere"), CPU, None)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 12, 20, 24, 64, 192, 384, 768, 1024, 1152, 1280, 1408, 1664, 1792])
def test_hadamard_matrices_of_towers_widths_are_orthogonal_and_flat(width: int) -> None:
    found = hadamard(width)
    torch.testing.assert_close(found @ found.T, torch.eye(width, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.abs(), torch.full_like(found, width**-0.5))


def _correlated(seed: int) -> Tensor:
    """(60, 12) tokens with means and variances of their own, and correlations."""
    return draw(seed, 60, 12) @ draw(99, 12, 12) * torch.linspace(0.1, 30, 12) + torch.linspace(-50, 50, 12)


@pytest.mark.parametrize("kind", ["channel", "phi_s"])
def test_standardised_tokens_have_no_mean_and_unit_variance(kind: str) -> None:
    tokens, state = _correlated(1), dict[str, Tensor]()
    found = Standardiser(kind, 1, state, "0.-2", None)(tokens)
    torch.testing.assert_close(found.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.var(0, correction=0), torch.ones(12), atol=1e-3, rtol=0)
    if kind == "phi_s":  # one rotation and one factor: every distance in the same proportion
        ratio = torch.pdist(found.double()) / torch.pdist(tokens.double())
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


def test_phi_s_is_the_papers_formula() -> None:
    covariance = torch.cov(_correlated(2).double().T, correction=0)
    found = phi_s(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    alike = (hadamard(12) @ vectors.T @ covariance @ vectors @ hadamard(12).T).diagonal()
    torch.testing.assert_close(alike, values.mean().expand(12))
    torch.testing.assert_close((found.T @ covariance @ found).diagonal(), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(found @ found.T, torch.eye(12, dtype=torch.float64) / values.mean())


@pytest.mark.parametrize("kind", ["channel", "phi_s"])
def test_the_statistics_are_those_of_the_first_batches_and_then_stand(kind: str) -> None:
    state: dict[str, Tensor] = {}
    standardise = Standardiser(kind, 2, state, "0.-2", None)
    standardise(_correlated(1))
    resumed = Standardiser(kind, 2, copy.deepcopy(state), "0.-2", None)  # from a checkpoint between the two
    second = standardise(_correlated(2))
    assert torch.equal(resumed(_correlated(2)), second)
    together = Standardiser(kind, 1, {}, "0.-2", None)
    together(torch.cat([_correlated(1), _correlated(2)]))
    torch.testing.assert_close(second, together(_correlated(2)), rtol=1e-4, atol=1e-4)
    assert "0.-2.sums" not in state
    before = standardise(_correlated(3))
    standardise(1000 * _correlated(4))
    assert torch.equal(standardise(_correlated(3)), before)


def test_a_channel_that_never_moves_is_zero_and_not_infinite() -> None:
    tokens = _correlated(1)
    tokens[:, 3] = 7.0
    found = Standardiser("channel", 1, {}, "0.-2", None)(tokens)
    assert found.isfinite().all()
    assert (found[:, 3] == 0).all()


def test_statistics_are_in_the_objectives_state(recipe_file: Path) -> None:
    sets = ("objectives.patch=1", "patch.standardise=channel", "patch.statistics=1")
    objectives, fresh = (ObjectiveSet(_recipe(recipe_file, *sets), CPU, None) for _ in range(2))
    teacher = embeddings_with(**{"patches__-2": 5 + 3 * draw(4, 3, 2, 4, 6)})
    objectives.losses(embeddings_with(patch__0=draw(3, 3, 2, 4, 6)), [teacher])
    assert set(objectives.state()) == {"patch.0.-2.batches", "patch.0.-2.mean", "patch.0.-2.map"}
    fresh.restore(objectives.state())
    later = embeddings_with(**{"patches__-2": draw(5, 3, 2, 4, 6)})
    own = embeddings_with(patch__0=draw(6, 3, 2, 4, 6))
    assert torch.equal(fresh.losses(own, [later], 1)["patch"], objectives.losses(own, [later], 1)["patch"])


def test_nothing_is_read_where_no_objective_asks(recipe_file: Path) -> None:
    objectives = ObjectiveSet(_recipe(recipe_file, "objectives.similarity=1"), CPU, None)
    assert objectives.student_blocks == objectives.teacher_blocks == {}
    assert StepContext(embeddings_with()).student.features == {}
