"""name -> objective. The names are the fields of the recipe's `[objectives]`; a test holds the two together."""

from __future__ import annotations

from collections.abc import Callable

from megakd.objectives.base import Objective
from megakd.objectives.contrastive import Contrastive
from megakd.objectives.feature import Feature
from megakd.objectives.similarity import Similarity
from megakd.recipe import Recipe

REGISTRY: dict[str, Callable[[Recipe], Objective]] = {"contrastive": Contrastive, "similarity": Similarity, "feature": Feature}
