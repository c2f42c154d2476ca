"""`rkd` against itself written out over pairs and triples in float64, against the published code, and where points coincide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.objectives.base import Objective
from megakd.objectives.cost import LossShape
from megakd.planning.memory_tracker import MemoryTracker
from megakd_kernels import panels
from support import matrix_objectives as references
from support.loss_cases import Watch
from support.matrix_objectives import CPU, called, measure, objective, pairs, trained

# Legend: N pairs, D width.
N = 10
# Panels of three angles' lines at one point, of all lines at two points and of everything at once.
PANELS = {"lines": 3 * N * 8, "points": 2 * N * N * 8, "whole": 1 << 24}


def _relational(recipe_file: Path, on: str = "both", distance: float = 25.0, angle: float = 50.0) -> Objective:
    return objective(str(recipe_file), "rkd", f"rkd.on={on}", f"rkd.distance={distance}", f"rkd.angle={angle}")


@pytest.mark.parametrize("size", PANELS)
@pytest.mark.parametrize(("on", "distance", "angle"), [("both", 25.0, 50.0), ("image", 3.0, 0.0), ("text", 0.0, 2.0)])
def test_value_and_gradient_are_those_of_the_formula_in_float64(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, size: str, on: str, distance: float, angle: float
) -> None:
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", PANELS[size])
    student, teachers = pairs(N, 6, 12.0, 1), [pairs(N, 9, 25.0, 2), pairs(N, 4, 30.0, 3)]
    true = measure(lambda own, taught: sum(references.rkd(own, one, distance, angle, on) for one in taught) / 2, student, teachers)
    found = measure(called(_relational(recipe_file, on, distance, angle)), student, teachers)
    torch.testing.assert_close(found.loss, true.loss, rtol=1e-10, atol=0)
    for ours, expected in zip(found.gradients, true.gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    assert [bool(gradient.any()) for gradient in found.gradients] == [on != "text", on != "image", False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_embeddings_give_the_float32_loss_of_their_numbers(recipe_file: Path, dtype: torch.dtype) -> None:
    """All within a cone, as CLIP's are: without its axis the distances keep their digits."""
    student, teacher = (pairs(N, width, 12.0, seed) for width, seed in ((6, 1), (9, 2)))
    student, teacher = (
        model._replace(**{side: F.normalize(getattr(model, side) + 4, dim=-1).to(dtype) for side in ("image", "text")})
        for model in (student, teacher)
    )
    found = measure(called(_relational(recipe_file)), student, [teacher])
    doubled = [model._replace(image=model.image.double(), text=model.text.double()) for model in (student, teacher)]
    true = measure(lambda own, taught: references.rkd(own, taught[0], 25.0, 50.0), doubled[0], doubled[1:])
    assert found.loss.dtype == (torch.float64 if student.scale.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.loss.double(), true.loss.double(), rtol=1e-5, atol=0)
    for ours, expected in zip(found.gradients, true.gradients, strict=True):
        assert (ours.double() - expected).norm() <= (1e-4 if dtype == torch.float32 else 1e-2) * expected.norm()


@pytest.mark.parametrize("count", [1, 2, N])
def test_a_student_that_is_its_teacher_has_a_loss_of_exactly_zero(recipe_file: Path, count: int) -> None:
    teacher = pairs(count, 6, 60.0, 2, torch.float32)
    outcome = measure(called(_relational(recipe_file)), teacher, [teacher])
    assert outcome.loss == 0
    assert not any(gradient.any() for gradient in outcome.gradients)


def _published_angles(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    cosines = []
    for x_ND in (student_ND, teacher_ND):
        rays_NND = F.normalize(x_ND[None] - x_ND[:, None], p=2, dim=2)
        cosines.append(torch.bmm(rays_NND, rays_NND.transpose(1, 2)).view(-1))
    return F.smooth_l1_loss(*cosines)


def _published_distances(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    relative = []
    for x_ND in (student_ND, teacher_ND):
        squares_N = x_ND.square().sum(1)
        d_NN = (squares_N[:, None] + squares_N - 2 * x_ND @ x_ND.T).clamp(min=1e-12).sqrt() * (1 - torch.eye(len(x_ND), dtype=x_ND.dtype))
        relative.append(d_NN / d_NN[d_NN > 0].mean())
    return F.smooth_l1_loss(*relative)


def test_it_is_the_published_code_which_holds_all_rays_and_angles_at_once(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", PANELS["lines"])
    student, teacher = pairs(N, 16, 12.0, 1), pairs(N, 32, 25.0, 2)
    with Watch() as watch:
        theirs = 25 * _published_distances(student.image, teacher.image) + 50 * _published_angles(student.image, teacher.image)
    assert watch.elements == N * N * 32
    with Watch() as watch:
        ours = called(_relational(recipe_file, "image"))(student, [teacher])
    assert watch.elements == N * 32
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_no_tensor_holds_a_matrix_of_all_points_by_all(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, width = 40, 6
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", 5 * count * 4)
    student, teacher = pairs(count, width, 12.0, 1, torch.float32), pairs(count, width, 25.0, 2, torch.float32)
    with Watch() as watch:
        measure(called(_relational(recipe_file, "text")), student, [teacher])
    assert watch.elements == count * width


@pytest.mark.parametrize("count", [1, 2, 5])
def test_coinciding_points_have_finite_gradients_unlike_in_the_published_code(recipe_file: Path, count: int) -> None:
    student, teacher = pairs(count, 6, 12.0, 1, torch.float32), pairs(count, 9, 25.0, 2, torch.float32)
    every = student._replace(image=student.image[:1].repeat(count, 1), text=student.text[:1].repeat(count, 1))
    two = student._replace(image=torch.cat([student.image[:1], student.image[:-1]])) if count > 1 else student
    loss = called(_relational(recipe_file))
    for own, taught in ((every, teacher), (student, every), (every, every), (two, teacher), (student, two)):
        outcome = measure(loss, own, [taught])
        assert torch.isfinite(outcome.loss)
        assert all(gradient.abs().max() < 1e3 for gradient in outcome.gradients)
    if count == 5:
        own_ND = two.image.clone().requires_grad_()
        _published_angles(own_ND, teacher.image).backward()
        assert own_ND.grad is not None
        assert own_ND.grad.abs().max() > 1e6


def test_angles_are_planned_for_what_they_cost(recipe_file: Path) -> None:
    shape = LossShape(1024, 1, (512, 512), (2, 2), 1, False, CPU)
    with_angles, without, one = (
        _relational(recipe_file, *options).cost(shape) for options in ((), ("both", 1.0, 0.0), ("image", 25.0, 50.0))
    )
    assert with_angles.flops / 2 == pytest.approx(one.flops)
    assert one.flops == pytest.approx(6.6e12, rel=0.01)
    assert without.flops < with_angles.flops / 200


@pytest.mark.parametrize(
    ("width", "settings", "panel_bytes", "count"),
    [(64, ["rkd.on=image"], 1 << 20, 1), (256, [], 1 << 20, 3), (64, ["rkd.angle=0.0"], 1 << 16, 2)],
)
def test_memory_is_planned_as_it_is(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, width: int, settings: list[str], panel_bytes: int, count: int
) -> None:
    """At 160 pairs, where a panel holds all angles at 10 points, to 20 %."""
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", panel_bytes)
    built = objective(str(recipe_file), "rkd", *settings)
    student = trained(pairs(160, width, 12.0, 1, torch.float32))
    teachers = [pairs(160, width, 25.0, seed, torch.float32) for seed in range(count)]
    watch = MemoryTracker("cpu")
    watch.ignore(tensor for model in (student, *teachers) for tensor in model[:3])
    with watch:
        called(built)(student, teachers).backward()
    planned = built.cost(LossShape(160, 1, (width, count * width), (4, 4), count, False, CPU)).memory
    assert planned == pytest.approx(watch.peak, rel=0.2)


def test_weights_of_nothing_are_refused(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)rkd.*distance and angle are both 0.*objectives\.rkd to 0"):
        _relational(recipe_file, "both", 0.0, 0.0)
