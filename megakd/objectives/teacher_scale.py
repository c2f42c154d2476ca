"""The logit scale at which objectives see each teacher: its own, or the recipe's `teacher.scale` in its place."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.models.embeddings import Embeddings
from megakd.recipe import Recipe


class TeacherScales:
    """Of the recipe's teachers that have a weight, in their order."""

    def __init__(self, recipe: Recipe) -> None:
        self._scales = [settings.scale for settings in recipe.weighted_teachers().values()]

    def __call__(self, teachers: Sequence[Embeddings]) -> list[Embeddings]:
        """Live or from a store: what the embeddings themselves are does not depend on the scale."""
        if not any(self._scales):
            return list(teachers)
        return [
            teacher if scale is None else teacher._replace(scale=teacher.scale.new_tensor(scale))
            for teacher, scale in zip(teachers, self._scales, strict=True)
        ]
