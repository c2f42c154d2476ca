"""TinyCLIP's affinity mimicking is `similarity` with both scales fixed: the shipped recipe against the formula of the authors' code."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megakd.models.embeddings import Embeddings
from megakd.objectives.set import ObjectiveSet, weighted_sum
from megakd.recipe import load as recipes
from support.matrix_objectives import CPU, Outcome, measure, pairs


def _soft_loss(student: Embeddings, teachers: Sequence[Embeddings]) -> Tensor:
    """`ClipSoftLoss.forward` of TinyCLIP's clip_soft_loss.py on one process, at its scale for both models."""
    (teacher,) = teachers
    logits_per_image = 50.0 * student.image @ student.text.T
    teacher_logits_per_image = 50.0 * teacher.image @ teacher.text.T
    ways = ((logits_per_image, teacher_logits_per_image), (logits_per_image.T, teacher_logits_per_image.T))
    return sum(cross_entropy(own, other.softmax(-1)) for own, other in ways) / 2  # type: ignore[return-value]


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_the_shipped_recipe_is_affinity_mimicking_but_for_the_teachers_entropy(backend: str) -> None:
    """Cross-entropy is KL divergence and the entropy of the labels, which no student can change: the gradients are equal."""
    objectives = ObjectiveSet(recipes.load("tinyclip_vit39m", [f"kernels.backend={backend}"])[0], CPU, None)

    def ours(student: Embeddings, teachers: Sequence[Embeddings]) -> Tensor:
        return weighted_sum(objectives.losses(student, teachers), objectives.weights)

    student, teacher = pairs(13, 6, 20.0, 1), pairs(13, 9, 100.0, 2)
    found, expected = measure(ours, student, [teacher]), measure(_soft_loss, student, [teacher])
    entropy = _soft_loss(teacher, [teacher])
    torch.testing.assert_close(found, Outcome(expected.loss - entropy, expected.gradients), rtol=1e-9, atol=1e-11)
    assert not found.gradients[2].any()  # the student's own scale learns nothing
