"""The contract of an objective: embeddings in, its losses out. What a recipe knows of it is declared in `recipe/objectives.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.models.heads import ModelShape, ObjectiveHead
from megakd.models.patches import Read
from megakd.objectives import cost
from megakd.objectives.cost import LossCost, LossShape
from megakd.recipe import Recipe
from megakd.recipe.objectives import declaration
from megakd.runtime import precision
from megakd_kernels import SimilarityLoss, choose


@dataclass(frozen=True)
class StepContext:
    """What an objective is called with: this rank's part of one step's batch of pairs.

    teachers: in the recipe's order, none where no active objective needs one. group: the ranks whose pairs form one batch, None for this
    process alone. step: optimiser steps done before this one. weights: of the teachers, not all 0; none given: all alike.
    """

    student: Embeddings
    teachers: Sequence[Embeddings] = ()
    group: ProcessGroup | None = None
    step: int = 0
    weights: Sequence[float] = ()

    @property
    def is_equal(self) -> bool:
        """Whether all teachers have the same weight."""
        return len(set(self.weights)) < 2

    def with_text(self) -> StepContext:
        """The same with those teachers alone that have a text tower, whose weights keep their proportions."""
        places = [place for place, teacher in enumerate(self.teachers) if teacher.has_text]
        weights = [self.weights[place] for place in places] if self.weights else ()
        return replace(self, teachers=[self.teachers[place] for place in places], weights=weights)

    def mean(self, losses: Sequence[Tensor]) -> Tensor:
        """One loss a teacher, in their order, as one: their mean by the teachers' weights."""
        if self.is_equal:
            return torch.stack(list(losses)).mean()
        total = sum(self.weights)
        return torch.stack([loss * (weight / total) for loss, weight in zip(losses, self.weights, strict=True)]).sum()

    def mean_of_pairs(self, values: Sequence[Tensor]) -> Tensor:
        """(B,): the same of each pair. values: (B,) of each teacher."""
        values_TB, weights = torch.stack(list(values)), self.weights or [1.0] * len(values)
        return (values_TB * values_TB.new_tensor(weights)[:, None]).sum(0) / sum(weights)

    def kd(
        self, teachers: Sequence[Embeddings], loss: Callable[[Sequence[Embeddings], bool], SimilarityLoss], hard: bool
    ) -> SimilarityLoss:
        """A loss of `megakd_kernels` that averages its teachers: one call, or where their weights differ one call for each.

        teachers: all of the context or none. loss: of some teachers, and whether with its hard part, which is computed once.
        """
        if self.is_equal or not teachers:
            return loss(teachers, hard)
        parts = [loss([teacher], hard and place == 0) for place, teacher in enumerate(teachers)]
        return SimilarityLoss(self.mean([part.kd for part in parts]), parts[0].hard)


class Objective(ABC):
    """One or several losses of the recipe's `[objectives]` that share their work. It is called once a step, on the whole batch of its rank.

    names: keys of `[objectives]` that it computes, in the recipe's order.
    backend: which implementation of `megakd_kernels` it calls; None where it calls none.
    reads_text: the student's texts, where one of its teachers has some to compare them with.
    needs_text: of its teachers, a text tower; it is not called with others, has no head for them, and places count those it is called with.
    student_blocks, teacher_blocks: what it reads of the vision towers' blocks: the student's through its head, and every teacher's
    in `Embeddings.features`.
    of_pairs: its `names` where a loss is a mean over pairs that `pairs` gives one by one; () where it does not.
    state: tensors kept from step to step under names of its own, equal on every rank. They are saved with each checkpoint, and are there
    again, on the device, before the first step of a run that goes on.
    """

    backend: str | None = None
    student_blocks: tuple[Read, ...] = ()
    teacher_blocks: tuple[Read, ...] = ()
    of_pairs: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        self.names, self.state = names, dict[str, Tensor]()
        self.needs_text = self.reads_text = any(declaration(name).needs_text for name in names)

    @classmethod
    def shared(cls, recipe: Recipe, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The active losses of this class in groups, of which one object computes each; all in one unless a subclass says otherwise."""
        return [names]

    def head(self, student: ModelShape, teacher: ModelShape) -> ObjectiveHead | None:
        """What to train inside the engine for a teacher; outputs come back by their `head_name`. None for none.

        Raises ValueError naming the recipe's key when the shapes do not fit each other.
        """
        return None

    def cost(self, shape: LossShape) -> LossCost:
        """Memory, traffic and FLOPs of one rank and step, for `megakd plan`. Without an override: those of eager, N x N products."""
        return cost.eager(shape)

    @abstractmethod
    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        """Each of `names` as a float32 scalar whose gradient, averaged over ranks, is that of the global batch; the teachers' mean."""
        ...

    def pairs(self, context: StepContext) -> dict[str, Tensor]:
        """Each of `of_pairs` pair by pair: (B,) of this rank's, whose mean over all ranks is the loss, but for rounding. Without gradient.

        A collective, called beside the loss where the sources of a mixture are told apart, on logged steps alone.
        """
        return {}


def head_name(objective: str, place: int) -> str:
    """The key in `student.projected` of an objective's projection to the teacher at `place` (from 0)."""
    return objective if place == 0 else f"{objective}{place}"


class KernelOptions(TypedDict):
    """The arguments of `megakd_kernels`' losses that say how to compute them, not what."""

    backend: str
    ring: bool


def kernel_options(recipe: Recipe, loss: str, device: torch.device) -> KernelOptions:
    """`[kernels]` of the recipe with "auto" resolved for a loss of `megakd_kernels` over the recipe's global batch.

    Raises ValueError naming the key where the forced backend cannot run on this device.
    """
    options: dict[str, Any] = {"backend": recipe.kernels.backend, "ring": recipe.kernels.ring}
    try:
        halves = precision.of(device) == "bf16"
        chosen = choose(loss, recipe.optim.batch, device, torch.float32, halves=halves, **options)
        return KernelOptions(backend=chosen, ring=recipe.kernels.ring)
    except ValueError as error:
        raise ValueError(f"kernels.backend = {recipe.kernels.backend!r}: {error}") from error
