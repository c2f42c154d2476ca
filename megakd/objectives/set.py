"""The recipe's objectives on pairs, and the weighted sum of a step's losses."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd.models import clip
from megakd.models.embeddings import Embeddings
from megakd.models.grids import averaged_shape
from megakd.models.heads import ModelShape, ObjectiveHead
from megakd.models.patches import Weights, measure
from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, head_name
from megakd.objectives.cost import LossCost, LossShape
from megakd.objectives.teacher_scale import NAME as SCALES
from megakd.objectives.teacher_scale import TeacherScales
from megakd.recipe import Recipe, Teacher
from megakd.recipe.models import IN_SHARDS
from megakd.recipe.objectives import declaration
from megakd.runtime.wire import Wire

OfTeacher = TypeVar("OfTeacher", Embeddings, ModelShape, clip.ModelSpec)


def build(recipe: Recipe, device: torch.device) -> list[Objective]:
    """The active objectives, in the order of the recipe's keys. Raises ValueError for a forced backend that cannot run on `device`."""
    by_class: dict[str, tuple[str, ...]] = {}
    for name in recipe.active():
        where = declaration(name).where
        by_class[where] = (*by_class.get(where, ()), name)
    built: list[Objective] = []
    for where, names in by_class.items():
        module, _, class_name = where.rpartition(".")
        kind: type[Objective] = getattr(importlib.import_module(module), class_name)
        built += [kind(recipe, device, together) for together in kind.shared(recipe, names)]
    return built


class ObjectiveSet:
    """The recipe's objectives with a positive weight, ready to be called on embeddings.

    student_blocks, teacher_blocks: what is read of the vision towers' blocks, with the name of an objective that reads it.
    """

    def __init__(self, recipe: Recipe, device: torch.device, group: ProcessGroup | None) -> None:
        """group: the ranks whose pairs form one batch; None is this process alone.

        Raises ValueError when an objective needs what the recipe's models do not have, and for a backend that cannot run.
        """
        self.weights = recipe.active()
        in_need = recipe.in_need_of_a_teacher()
        self.needs_teacher = bool(in_need)
        if in_need and recipe.teacher is None:
            raise ValueError(
                f"objectives.{', objectives.'.join(in_need)}: needs a teacher, and the recipe has no [teacher]; "
                f"add one or set the weight to 0"
            )
        self._objectives = build(recipe, device)
        self.student_blocks = {block: part.names[0] for part in self._objectives for block in part.student_blocks}
        self.teacher_blocks = {block: part.names[0] for part in self._objectives for block in part.teacher_blocks}
        stored = {role: one for role, one in recipe.weighted_teachers().items() if one.store is not None and one.store_of == "all"}
        without = [role for role, teacher in stored.items() if teacher.patch_grid is None]
        of_tokens = [name for read, name in self.teacher_blocks.items() if not isinstance(read, Weights)]
        if of_tokens and without and stored[without[0]].store == IN_SHARDS:
            raise ValueError(
                f"objectives.{of_tokens[0]}: reads the teacher's patch tokens, and with {without[0]}.store = {IN_SHARDS!r} there are "
                f"embeddings alone; set store_of to 'text' for every teacher, set the weight to 0, or take the stores out"
            )
        if of_tokens and without:
            raise ValueError(
                f"objectives.{of_tokens[0]}: reads the teacher's patch tokens, and {without[0]}.store holds "
                f"embeddings alone where {without[0]}.patch_grid is not given; set it to a grid to average patch tokens to, and make the "
                f"store with `megakd embed`, set {without[0]}.store_of to 'text', or take {without[0]}.store out"
            )
        weighing = [name for read, name in self.teacher_blocks.items() if isinstance(read, Weights)]
        if weighing and stored:
            role = next(iter(stored))
            raise ValueError(
                f"{weighing[0]}.map = 'weights': {role}.store holds no attention; set it to 'activation', which is of patch tokens, set "
                f"{role}.store_of to 'text', or take {role}.store out"
            )
        self._scales = TeacherScales(recipe, group)
        self.logged = tuple(f"{SCALES}.{role}" for role in self._scales.matched if self.needs_teacher)
        self._recipe, self._device, self._group = recipe, device, group
        self.backends = {name: part.backend for part in self._objectives for name in part.names if part.backend is not None}

    @property
    def of_texts(self) -> list[str]:
        """Names of those that compare with a teacher's texts, and so leave a teacher of images alone out."""
        named = {name for part in self._objectives if part.needs_text for name in part.names}
        return [name for name in self.weights if name in named and declaration(name).needs_teacher]

    def reads_texts(self, teachers: Sequence[OfTeacher]) -> bool:
        """Whether any of them reads the student's texts; where none does, its text tower has no gradient."""
        of_both = any(teacher.has_text for teacher in teachers)
        return any(part.needs_text or (part.reads_text and of_both) for part in self._objectives)

    def reads_captions(self, teachers: Sequence[OfTeacher]) -> bool:
        """Whether captions are tokenised: for an objective, or for a teacher's own text tower, which runs with its other one."""
        return self.reads_texts(teachers) or any(teacher.has_text for teacher in teachers)

    def check_bias(self, model: str, has_bias: bool) -> None:
        """Raises ValueError when an objective needs the logit bias of a sigmoid-trained model that `model` has not."""
        in_need = sorted(name for name in self.weights if declaration(name).needs_bias)
        if in_need and not has_bias:
            raise ValueError(
                f"objectives.{in_need[0]}: the {model} has no logit bias, so every pair would count as a match; use a model trained "
                f"with a sigmoid loss, or give a {model}.architecture of your own `init_logit_bias` (SigLIP starts at -10)"
            )

    def heads(self, student: ModelShape, teachers: Sequence[ModelShape]) -> dict[str, ObjectiveHead]:
        """What the objectives train beside the towers, one for each teacher, by name. They go into the engine with the student."""
        built = {
            head_name(part.names[0], place): part.head(student, teacher)
            for part in self._objectives
            for place, teacher in enumerate(_read_by(part, teachers))
        }
        return {name: head for name, head in built.items() if head is not None}

    def by_head(self, teachers: Sequence[OfTeacher]) -> dict[str, tuple[str, OfTeacher]]:
        """Objective and teacher of each head, by the head's name in `heads`; teachers: in the recipe's order, or what is known of each."""
        return {
            head_name(part.names[0], place): (part.names[0], teacher)
            for part in self._objectives
            for place, teacher in enumerate(_read_by(part, teachers))
        }

    def outline(self, student: ModelShape, teachers: Sequence[ModelShape]) -> str:
        """What the heads do, for the run's first lines; empty where none has anything to say. Raises ValueError as `Objective.head`."""
        with torch.device("meta"):
            heads = self.heads(student, teachers)
        return ", ".join(f"{name} {head.summary}" for name, head in heads.items() if head.summary)

    def shapes(self, student: clip.ModelSpec, teachers: Sequence[clip.ModelSpec]) -> list[ModelShape]:
        """What heads and losses must know of the student and of each teacher; nothing is built where the embeddings' widths say all.

        Raises ValueError naming the key for a block that is not there, where embeddings of unlike width are compared as they are, and for
        an objective without a teacher whose texts it can read.
        """
        with_text = [teacher for teacher in teachers if teacher.has_text]
        if self.of_texts and teachers and not with_text:
            of_images = ", ".join(f"{teacher.role} ({teacher.settings.model})" for teacher in teachers)
            raise ValueError(
                f"objectives.{self.of_texts[0]}: compares the student's texts with a teacher's, and {of_images} sees images alone; set its "
                f"weight to 0 and learn by feature, patch or patch_relation, or add a teacher with a text tower ([ensemble])"
            )
        if self.of_texts and with_text and (step := self._recipe.first_without([teacher.role for teacher in with_text])) is not None:
            raise ValueError(
                f"schedules: at step {step} the weight of {' and '.join(teacher.role for teacher in with_text)} is 0, and no other teacher "
                f"has texts for objectives.{self.of_texts[0]}; keep one above 0, and schedule objectives.{self.of_texts[0]} itself to "
                f"leave it out of a step"
            )
        for name in self.weights:
            for teacher in with_text if declaration(name).one_width else ():
                if teacher.width != student.width:
                    raise ValueError(
                        f"objectives.{name}: needs embeddings of one width, and the student's have {student.width} numbers "
                        f"where those of {teacher.role} have {teacher.width}; give the student that embed_dim, or set the weight to 0"
                    )
        asked = [("blocks", self.student_blocks), *(("teacher_blocks", self.teacher_blocks) for _ in teachers)]
        shapes = []
        for model, (key, readers) in zip((student, *teachers), asked, strict=True):
            visual: Any = clip.on_meta(model).clip.visual if readers else None
            found = {block: measure(visual, block, f"{model.role}: {name}.{key}") for block, name in readers.items()}
            grid = model.settings.patch_grid if isinstance(model.settings, Teacher) else None
            found = {block: averaged_shape(patches, grid, f"{model.role}.patch_grid") for block, patches in found.items()}
            shapes.append(ModelShape(model.width, found, model.has_text))
        return shapes

    def losses(self, student: Embeddings, teachers: Sequence[Embeddings], step: int = 0) -> dict[str, Tensor]:
        """Unweighted float32 scalars by objective name, in the order of `weights`. step: optimiser steps done before this one."""
        losses = dict[str, Tensor]()
        context = self._context(student, self._scales(student, teachers) if teachers else [], step)
        for objective in self._objectives:
            losses |= objective(context.with_text() if objective.needs_text else context)
        return {name: losses[name] for name in self.weights}

    def _context(self, student: Embeddings, teachers: Sequence[Embeddings], step: int) -> StepContext:
        return StepContext(student, teachers, self._group, step, self._recipe.teacher_weights(step) if teachers else ())

    @property
    def of_pairs(self) -> tuple[str, ...]:
        """The losses that are known pair by pair, in the order of `weights`."""
        named = {name for part in self._objectives for name in part.of_pairs}
        return tuple(name for name in self.weights if name in named)

    @torch.no_grad()
    def pairs(self, student: Embeddings, teachers: Sequence[Embeddings], step: int = 0) -> dict[str, Tensor]:
        """(B,) by the names `of_pairs`: what each pair of this rank adds to the mean that `losses`, called before with these, has given."""
        found, context = dict[str, Tensor](), self._context(student, self._scales.scaled(teachers) if teachers else [], step)
        for objective in self._objectives:
            found |= objective.pairs(context.with_text() if objective.needs_text else context)
        return found

    def weights_at(self, step: int) -> dict[str, float]:
        """Of each loss in the step number `step`, from 0; `weights` has the largest over the run."""
        return {name: self._recipe.value_at(f"objectives.{name}", step) for name in self.weights}

    def cost(self, shape: LossShape) -> LossCost:
        """Of all active objectives on one rank in one step. Scales are matched before a loss is computed, and keep no memory."""
        costs, scales = [part.cost(shape.with_text() if part.needs_text else shape) for part in self._objectives], self._scales.cost(shape)
        told_apart = isinstance(self._recipe.data.train, dict) and any(part.of_pairs and part.backend for part in self._objectives)
        beside = cost.by_pair(shape) if told_apart else 0  # on logged steps, which hold their losses' memory meanwhile
        memory = max(sum(one.memory for one in costs) + beside, scales.memory)
        return LossCost(memory, sum((one.wire for one in (*costs, scales)), Wire()), sum(one.flops for one in (*costs, scales)))

    def values(self) -> dict[str, Tensor]:
        """Scalars by the names in `logged`: what the last step's losses went by, equal on every rank."""
        return {f"{SCALES}.{role}": value for role, value in self._scales.values().items()} if self.logged else {}

    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU of what objectives keep from step to step, as OBJECTIVE.NAME, and of matched scales, as teacher_scale.ROLE."""
        owners = {**{part.names[0]: part.state for part in self._objectives}, SCALES: self._scales.state}
        kept = {f"{owner}.{name}": value for owner, state in owners.items() for name, value in state.items()}
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in kept.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Give each objective what `state` returned. Raises ValueError for that of one which the recipe does not have."""
        owners = {part.names[0]: part.state for part in self._objectives}
        if self._scales.matched:
            owners[SCALES] = self._scales.state
        for key, value in state.items():
            owner, _, name = key.partition(".")
            if owner not in owners:
                raise ValueError(f"objectives.{owner}: the checkpoint has its state {name!r}, and the recipe gives it no weight")
            owners[owner][name] = value.to(self._device)


def _read_by(objective: Objective, teachers: Sequence[OfTeacher]) -> list[OfTeacher]:
    """The teachers that an objective is called with, in their order."""
    return [teacher for teacher in teachers if teacher.has_text or not objective.needs_text]


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """What a step differentiates. losses: by name, one at least, each with a weight."""
    first, *others = (weights[name] * loss for name, loss in losses.items())
    return sum(others, start=first)
