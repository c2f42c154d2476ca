"""`contrastive` and `similarity`: losses on the softmaxes over the rows and columns of the similarity matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from megakd.models.embeddings import Embeddings
from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, kernel_options
from megakd.objectives.cost import LossCost, LossShape
from megakd.objectives.lines import divergence, match, matrices, of_pairs
from megakd.recipe import Recipe, Similarity
from megakd.recipe.section import MATCHED
from megakd_kernels import SimilarityLoss
from megakd_kernels.similarity import similarity_kd

CONTRASTIVE, SIMILARITY = "contrastive", "similarity"


@final
class Softmax(Objective):
    """contrastive: InfoNCE, CLIP's own loss (arXiv 2103.00020). similarity: KL(teacher || student), see `megakd_kernels.similarity_kd`.

    The student's logit scale is its learned one, or the recipe's `similarity.student_scale`, which then gets no gradient from here.
    With temperatures t of the student and u of the teacher, similarity is t^2 KL(softmax(b / u) || softmax(a / t)). t alone multiplies:
    for large temperatures the gradient at a then tends to the difference of a and (t / u) b over N, each less its mean, whatever t is, and
    u only says how sharp the targets are.
    """

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        assert recipe.student is not None, "a recipe with objectives has a student"
        self.of_pairs = names
        self._recipe, self._max_scale = recipe, recipe.student.max_scale
        self._fixed_scale = recipe.similarity.student_scale if SIMILARITY in names else None
        self._options = kernel_options(recipe, "similarity_kd" if SIMILARITY in names else "contrastive", device)
        self.backend = self._options["backend"]
        moving = [key for key in ("similarity.temperature", "similarity.teacher_temperature") if key in recipe.schedules]
        if moving and self.backend == "compiled":
            raise ValueError(f"kernels.backend = 'compiled': would compile anew for each value of schedules.{moving[0]}; choose another")
        self._are_matched = any(settings.scale == MATCHED for settings in recipe.weighted_teachers().values())
        self._largest: float | None = None
        self._weighs_alike = recipe.weighs_teachers_alike()

    @classmethod
    def shared(cls, recipe: Recipe, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Both together, where they see the same student logits: one pass then yields both."""
        return [names] if recipe.similarity.student_scale is None else [(name,) for name in names]

    def cost(self, shape: LossShape) -> LossCost:
        if SIMILARITY not in self.names:
            return cost.of_kernel(cost.SOFTMAX_HARD, self._options["backend"], shape)
        return (cost.of_kernel if self._weighs_alike else cost.one_by_one)(cost.SOFTMAX_KD, self._options["backend"], shape)

    def _compared(self, context: StepContext) -> tuple[Embeddings, list[Embeddings], Similarity]:
        """Student and teachers at the scales at which they are compared, and the options of this step."""
        student, teachers = context.student, list(context.teachers) if SIMILARITY in self.names else []
        options: Similarity = self._recipe.section_at("similarity", context.step)
        sharpened = _sharpened(options)
        if sharpened != 1:  # b / u = (t / u) b / t
            teachers = [teacher._replace(scale=teacher.scale * sharpened) for teacher in teachers]
        if self._fixed_scale is not None:
            student = student._replace(scale=student.scale.new_tensor(self._fixed_scale))
        return student, teachers, options

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        student, teachers, options = self._compared(context)
        # Once: teachers are frozen, and reading a scale waits for the device. Those of matched scales differ in every step.
        if self._largest is None and not (teachers and self._are_matched):
            self._largest = max([0.0, *(float(teacher.scale) for teacher in context.teachers if teachers)])
        limit = None
        if self._largest is not None:  # a little more, for the rounding of exp and of the products
            limit = 1.001 * max(self._fixed_scale or self._max_scale, _sharpened(options) * self._largest)

        def loss_of(these: Sequence[Embeddings], hard: bool) -> SimilarityLoss:
            return similarity_kd(
                student,
                [*these] or None,
                temperature=options.temperature,
                hard=hard,
                scale_limit=limit,
                group=context.group,
                **self._options,
            )

        loss = context.kd(teachers, loss_of, CONTRASTIVE in self.names)
        return {name: {SIMILARITY: loss.kd, CONTRASTIVE: loss.hard}[name] for name in self.names}

    def pairs(self, context: StepContext) -> dict[str, Tensor]:
        """By panels of the matrix, whatever the loss is computed by."""
        student, teachers, options = self._compared(context)
        own, taught = matrices(replace(context, student=student, teachers=teachers), whole=False)

        found = {CONTRASTIVE: of_pairs(match, own)} if CONTRASTIVE in self.names else {}
        if SIMILARITY in self.names:
            line = partial(divergence, temperature=options.temperature)
            found[SIMILARITY] = context.mean_of_pairs([of_pairs(line, own, teacher) for teacher in taught])
        return found


def _sharpened(options: Similarity) -> float:
    """t / u, by which a teacher's scale is multiplied."""
    return options.temperature / (options.teacher_temperature or options.temperature)
