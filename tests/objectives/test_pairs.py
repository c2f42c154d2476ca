"""Losses pair by pair, for what is told of a mixture's sources: their mean is the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megakd.objectives.base import StepContext
from megakd.recipe import Objectives
from support.matrix_objectives import objective, pairs

TOLD = (
    *("contrastive", "similarity", "sigmoid_contrastive", "sigmoid_similarity", "standardised", "dkd", "dist", "gradient"),
    *("feature", "masked_feature"),
)
OPTIONS = {"similarity": ("similarity.temperature=2", "similarity.teacher_temperature=0.5", "similarity.student_scale=9")}


def test_the_page_names_those_that_are_told(recipe_file: Path) -> None:
    told = [name for name in Objectives.model_fields if objective(str(recipe_file), name, *_blocks(name)).of_pairs]
    assert sorted(told) == sorted(TOLD)


def _blocks(name: str) -> tuple[str, ...]:
    return (f"{name}.blocks=[-1]",) if name in ("patch", "patch_relation", "attention") else ()


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
@pytest.mark.parametrize("name", TOLD)
def test_the_mean_over_pairs_is_the_loss(recipe_file: Path, name: str, weights: tuple[float, ...]) -> None:
    built = objective(str(recipe_file), name, *OPTIONS.get(name, ()))
    student = pairs(9, 16, 20.0, 1)._replace(bias=torch.tensor(-3.0, dtype=torch.float64))
    teachers = [pairs(9, 16, 30.0, seed)._replace(bias=torch.tensor(-5.0, dtype=torch.float64)) for seed in (2, 3)]
    heads = {name: teachers[1][:2], f"{name}1": teachers[0][:2]}
    context = StepContext(student._replace(projected=heads), [] if name.endswith("contrastive") else teachers, weights=weights)
    (loss,) = built(context).values()
    (found_B,) = built.pairs(context).values()
    assert found_B.shape == (9,)
    assert found_B.std() > 1e-4  # not one number for all
    torch.testing.assert_close(found_B.mean(), loss.to(found_B.dtype), rtol=1e-5, atol=1e-7)


def test_a_pairs_part_of_contrastive_is_half_of_its_row_and_of_its_column(recipe_file: Path) -> None:
    student = pairs(5, 8, 10.0, 1)
    (found_B,) = objective(str(recipe_file), "contrastive").pairs(StepContext(student)).values()
    logits_NN = student.scale * student.image @ student.text.T
    expected_B = -(logits_NN.log_softmax(1).diagonal() + logits_NN.log_softmax(0).diagonal()) / 2
    torch.testing.assert_close(found_B, expected_B)
