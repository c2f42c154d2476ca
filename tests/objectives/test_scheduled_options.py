"""Every option of an objective that can be scheduled: in each step its loss is that of the value which the schedule has there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.models.embeddings import Embeddings
from megakd.objectives.base import StepContext
from megakd.objectives.set import build
from megakd.recipe import Objectives
from megakd.recipe import load as recipes
from megakd.recipe.schedules import schedulable
from support.runs import TEACHER

OPTIONS = [key for key in schedulable(recipes.load("smoke")[0]) if key.partition(".")[0] in Objectives.model_fields]


def _pair(seed: int, width: int) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(11, width, generator=generator), dim=-1) for _ in range(2))
    return Embeddings(image.requires_grad_(), text, torch.tensor(20.0))


def _loss(recipe_file: Path, key: str, step: int, setting: str) -> tuple[Tensor, Tensor]:
    """The loss and its gradient at the student's images."""
    name = key.partition(".")[0]
    weights = [f"objectives.{other}={float(other == name)}" for other in Objectives.model_fields]
    (objective,) = build(recipes.load(str(recipe_file), (*TEACHER, *weights, setting))[0], torch.device("cpu"))
    student = _pair(1, 16)
    loss = objective(StepContext(student, [_pair(5, 24)], step=step))[name]
    return loss.detach(), torch.autograd.grad(loss, student.image)[0]


def test_there_are_options_to_schedule() -> None:
    assert {"similarity.temperature", "dkd.alpha", "dist.temperature", "standardised.temperature", "rkd.angle"} <= set(OPTIONS)


@pytest.mark.parametrize("key", OPTIONS)
def test_a_step_goes_by_its_own_value(recipe_file: Path, key: str) -> None:
    moving = f"schedules.{key}={{ shape = 'linear', start = 0.5, end = 2.5, to_step = 4 }}"
    losses = {step: _loss(recipe_file, key, step, moving) for step in (0, 2, 4)}
    for step, value in ((0, 0.5), (2, 1.5), (4, 2.5)):
        for found, expected in zip(losses[step], _loss(recipe_file, key, step, f"{key}={value}"), strict=True):
            assert torch.equal(found, expected)
    assert len({float(loss) for loss, _ in losses.values()}) == 3


def test_a_step_in_which_both_weights_of_rkd_are_zero_has_no_loss(recipe_file: Path) -> None:
    """Before the angles begin, where distances have no weight at all."""
    loss, gradient = _loss(recipe_file, "rkd.angle", 0, "rkd={ distance = 0.0, angle = 1.0 }")
    assert loss > 0
    late = "schedules={ rkd.angle = { shape = 'linear', start = 0.0, end = 5.0 }, rkd.distance = { shape = 'constant', start = 0.0 } }"
    with pytest.raises(ValueError, match=r"schedules\.rkd\.distance: 0 in every step"):
        _loss(recipe_file, "rkd.angle", 0, late)
    fading = late.replace("{ shape = 'constant', start = 0.0 }", "{ shape = 'linear', start = 0.0, end = 1.0 }")
    loss, gradient = _loss(recipe_file, "rkd.angle", 0, fading)
    assert loss == 0
    assert not gradient.any()
