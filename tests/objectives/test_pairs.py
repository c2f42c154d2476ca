"""Losses pair by pair, for what is told of a mixture's sources: their mean is the loss."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megakd.objectives import cost
from megakd.objectives.base import StepContext
from megakd.objectives.cost import LossShape
from megakd.objectives.set import ObjectiveSet
from megakd.planning.memory_tracker import MemoryTracker
from megakd.recipe import Objectives
from megakd.recipe import load as recipes
from support.features import draw
from support.matrix_objectives import objective, pairs

TOLD = (
    *("contrastive", "similarity", "sigmoid_contrastive", "sigmoid_similarity", "standardised", "dkd", "dist", "gradient"),
    *("interactive", "cross", "augmented_feature"),
    *("feature", "masked_feature", "rkd", "patch", "patch_relation", "attention"),
)
OF_MAPS = ("patch", "patch_relation", "attention")
OPTIONS = {
    "similarity": ("similarity.temperature=2", "similarity.teacher_temperature=0.5", "similarity.student_scale=9"),
    "patch": ("patch.standardise=channel", "patch.statistics=1"),
    "attention": ("attention.loss=kl",),
}


def test_every_objective_is_told_by_pairs(recipe_file: Path) -> None:
    told = [name for name in Objectives.model_fields if objective(str(recipe_file), name, *_blocks(name)).of_pairs == (name,)]
    assert sorted(told) == sorted(TOLD) == sorted(Objectives.model_fields)


def _blocks(name: str) -> tuple[str, ...]:
    return (f"{name}.blocks=[-1]",) if name in OF_MAPS else ()


def _features(name: str, place: int) -> dict[str, Tensor]:
    """What a student's heads and a teacher's blocks hand over: a learned scale, and to objectives that read patch tokens their maps."""
    width = 1 if name == "attention" else 6
    head = f"{name}{place or ''}"
    scale = torch.tensor(12.0 + place)
    return {f"{head}.scale": scale, f"{head}.0": draw(3 + place, 9, 2, 4, width).abs(), "patches.-1": draw(5 + place, 9, 2, 4, 6)}


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
@pytest.mark.parametrize("name", TOLD)
def test_the_mean_over_pairs_is_the_loss(recipe_file: Path, name: str, weights: tuple[float, ...]) -> None:
    built = objective(str(recipe_file), name, *_blocks(name), *OPTIONS.get(name, ()))
    handed = [_features(name, place) for place in range(2)]
    student = pairs(9, 16, 20.0, 1)._replace(bias=torch.tensor(-3.0, dtype=torch.float64), features=handed[0] | handed[1])
    teachers = [
        pairs(9, 16, 30.0, 2 + place)._replace(bias=torch.tensor(-5.0, dtype=torch.float64), features=handed[place]) for place in range(2)
    ]
    heads = {name: teachers[1][:2], f"{name}1": teachers[0][:2]}
    context = StepContext(student._replace(projected=heads), [] if name.endswith("contrastive") else teachers, weights=weights)
    (loss,) = built(context).values()
    kept = copy.deepcopy(built.state)
    (found_B,) = built.pairs(context).values()
    assert found_B.shape == (9,)
    assert found_B.std() > 1e-4  # not one number for all
    torch.testing.assert_close(found_B.mean(), loss.to(found_B.dtype), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(built.state, kept, rtol=0, atol=0)  # what is kept from step to step is the loss's own


@pytest.mark.parametrize("name", TOLD[:11])
def test_the_plan_counts_what_it_takes_in_memory(recipe_file: Path, name: str) -> None:
    built, (student, teacher) = objective(str(recipe_file), name), (pairs(512, 16, 20.0, seed, torch.float32) for seed in (1, 2))
    student, teacher = (one._replace(bias=torch.tensor(-3.0)) for one in (student, teacher))
    teachers = [] if name.endswith("contrastive") else [teacher]
    student = student._replace(projected={name: teacher[:2]}, features=_features(name, 0))
    with MemoryTracker("cpu") as tracker, torch.no_grad():
        built.pairs(StepContext(student, teachers))
    shape = LossShape(512, 1, (16, 16 * len(teachers)), (4, 4), len(teachers), False, torch.device("cpu"))
    assert 0.2 * cost.by_pair(shape) < tracker.peak < 1.02 * cost.by_pair(shape)
    recipe, mixed = (recipes.load(str(recipe_file), sets)[0] for sets in ((), ("data.train={ a = { shards = 'x' } }",)))
    costs = [ObjectiveSet(one, torch.device("cpu"), None).cost(shape).memory for one in (recipe, mixed)]
    assert costs[1] - costs[0] == cost.by_pair(shape)


def test_a_pairs_part_of_contrastive_is_half_of_its_row_and_of_its_column(recipe_file: Path) -> None:
    student = pairs(5, 8, 10.0, 1)
    (found_B,) = objective(str(recipe_file), "contrastive").pairs(StepContext(student)).values()
    logits_NN = student.scale * student.image @ student.text.T
    expected_B = -(logits_NN.log_softmax(1).diagonal() + logits_NN.log_softmax(0).diagonal()) / 2
    torch.testing.assert_close(found_B, expected_B)
