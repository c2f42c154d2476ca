"""Names of the recipe's `[objectives]` -> objectives. A test holds the names and the recipe's fields together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megakd.objectives.base import Objective
from megakd.objectives.feature import FEATURE, feature
from megakd.objectives.interactive import INTERACTIVE, interactive
from megakd.objectives.sigmoid import sigmoid
from megakd.objectives.softmax import softmax
from megakd.recipe import Recipe

Builder = Callable[[Recipe, torch.device, tuple[str, ...]], Sequence[Objective]]

# Losses of one family share their products where they can.
FAMILIES: dict[tuple[str, ...], Builder] = {
    ("contrastive", "similarity"): softmax,
    ("sigmoid_contrastive", "sigmoid_similarity"): sigmoid,
    (INTERACTIVE,): interactive,
    (FEATURE,): feature,
}
WITHOUT_TEACHER = frozenset({"contrastive", "sigmoid_contrastive"})
WITH_BIAS = frozenset({"sigmoid_contrastive", "sigmoid_similarity"})


def build(recipe: Recipe, device: torch.device) -> list[Objective]:
    """The objectives with a positive weight. Raises ValueError for a forced backend that cannot run on `device`."""
    active = recipe.objectives.active()
    chosen = {tuple(name for name in family if name in active): builder for family, builder in FAMILIES.items()}
    return [objective for names, builder in chosen.items() if names for objective in builder(recipe, device, names)]
