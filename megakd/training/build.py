"""From a plan to what is trained: the student, the objectives' heads and the decoder in one module, what of it learns and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megakd.data.pairs import train_batches
from megakd.data.transforms import TowerView
from megakd.export.warm_start import warm_start
from megakd.models import casts, clip
from megakd.models.fingerprint import preprocessing
from megakd.models.student import Student
from megakd.models.vlm import decoder
from megakd.models.vlm.student import VisionLanguageStudent, freeze_all_but
from megakd.recipe import Recipe
from megakd.runtime import precision, watchdog
from megakd.runtime.checkpoint import Progress
from megakd.runtime.launch import World
from megakd.runtime.run_folder import RunLog
from megakd.teachers import build
from megakd.teachers.cached import StoredTeacher
from megakd.training.batch import JointBatches
from megakd.training.optim import decay_groups
from megakd.training.prepare import PreparedRun
from megakd.training.trainer import AnyTeacher
from megakd.vqa.loader import ImageProcessor, question_batches
from megakd.vqa.prompts import PromptEncoder


@dataclass(frozen=True)
class Learners:
    """The module for the engine, its AdamW parameter groups, and the student's towers inside it (None for a blind decoder)."""

    module: nn.Module
    groups: list[dict[str, object]]
    student: clip.ClipModel | None


def build_teachers(plan: PreparedRun, world: World, log: RunLog) -> dict[str, AnyTeacher]:
    """The recipe's teachers by role, live or from their store. A collective."""
    recipe, pairs = plan.request.recipe, plan.pairs
    if recipe.teacher is not None and not (pairs and pairs.teachers):
        log.say("the teacher is not loaded: no objective with a positive weight uses it")
    built: dict[str, AnyTeacher] = {}
    micro_batch = plan.config.micro_batch
    for role, description in pairs.teachers.items() if pairs else ():
        watchdog.beat(f"loading {role}")
        if pairs is not None and pairs.store is not None:
            log.say(pairs.store.outline())
            built[role] = build.stored_teacher(pairs.store, recipe, description, pairs.shards, world, piece=micro_batch, say=log.say)
        else:
            shards = None if pairs is None else pairs.shards
            built[role] = build.live_teacher(recipe, description, world, shards, piece=micro_batch, say=log.say)
    return built


def build_learners(plan: PreparedRun, teachers: Mapping[str, AnyTeacher], device: torch.device) -> Learners:
    """Everything that is trained, its weights loaded or drawn from torch's generator; on the CPU but for a quantised language model."""
    recipe = plan.request.recipe
    student = clip.build(plan.student, torch.device("cpu")) if plan.student is not None else None
    heads: dict[str, nn.Module] = {}
    if student is not None and recipe.student is not None and recipe.student.activation_checkpointing:
        student.clip.set_grad_checkpointing(True)  # type: ignore[operator]
    if plan.pairs is not None and plan.student is not None:
        heads = plan.pairs.task.heads(plan.student.width, [teacher.width for teacher in teachers.values()])
    module = _module(plan, student, heads, device)
    if plan.config.precision == "bf16" and student is not None:
        casts.for_engine(student.clip)
    return Learners(module, decay_groups(module, recipe.optim.weight_decay, _rates(recipe)), student)


def _module(plan: PreparedRun, student: clip.ClipModel | None, heads: dict[str, nn.Module], device: torch.device) -> nn.Module:
    recipe = plan.request.recipe
    max_scale = recipe.student.max_scale if recipe.student is not None else 1.0
    if plan.questions is None or recipe.decoder is None or recipe.answers is None:
        assert student is not None
        return Student(student.clip, heads, max_scale)
    dtype = precision.dtype(plan.config.precision)
    # Quantised weights are made where they stay; others go to the device with the engine, after the evaluator has made its copies.
    device = device if recipe.decoder.quantise != "none" else torch.device("cpu")
    reader = decoder.build(plan.questions.decoder, None if student is None else student.clip.visual, device, dtype)  # type: ignore[arg-type]
    if recipe.decoder.start is not None:
        warm_start(Path(recipe.decoder.start), reader, plan.student)
    tower_learns = recipe.answers.tower == "trained"
    clip = None if student is None else student.clip
    module = VisionLanguageStudent(clip, heads, max_scale, reader, recipe.decoder.layer, tower_learns=tower_learns)
    if plan.pairs is None:
        freeze_all_but(module, "decoder.", *(("clip.visual.",) if tower_learns else ()))
    return module


def _rates(recipe: Recipe) -> dict[str, float]:
    """Learning rates of `answers.lr` as multiples of the recipe's, by prefix of the parameters' names."""
    if recipe.answers is None:
        return {}
    given = recipe.answers.lr
    prefixes = {"clip.visual.": given.tower, "decoder.projector.": given.projector, "decoder.language.": given.decoder}
    return {prefix: rate / recipe.optim.lr for prefix, rate in prefixes.items() if rate is not None}


def prompt_encoder(plan: PreparedRun, module: VisionLanguageStudent) -> PromptEncoder:
    """How a question becomes a prompt of this run's decoder: in training, in evaluation and from its bundle alike."""
    recipe, questions = plan.request.recipe, plan.questions
    assert questions is not None
    assert recipe.decoder is not None
    assert recipe.answers is not None
    return PromptEncoder(questions.decoder.tokenizer, recipe.decoder, module.decoder.image_tokens, recipe.answers.max_length)


def image_processor(plan: PreparedRun, student: clip.ClipModel | None) -> ImageProcessor | None:
    return None if student is None else ImageProcessor(student.preprocess, plan.request.recipe.data.max_pixels)


def open_batches(
    plan: PreparedRun, learners: Learners, teachers: Mapping[str, AnyTeacher], progress: Progress, world: World
) -> JointBatches:
    """The loaders of pairs and of questions, from where `progress` stands."""
    recipe, pairs, questions = plan.request.recipe, plan.pairs, plan.questions
    workers, pin = recipe.data.workers, world.device.type == "cuda"
    of_pairs = of_questions = None
    if pairs is not None:
        of_pairs = train_batches(
            pairs.shards,
            pairs.order,
            recipe.views,
            _views(plan, learners, teachers),
            rank=world.rank,
            world=world.size,
            start_position=progress.position,
            workers=workers,
            pin_memory=pin,
            store=pairs.store,
            replay=recipe.teacher is not None and recipe.teacher.store_of == "all",
        )
    if questions is not None:
        assert isinstance(learners.module, VisionLanguageStudent)
        of_questions = question_batches(
            questions.train,
            questions.order,
            prompt_encoder(plan, learners.module),
            image_processor(plan, learners.student),
            rank=world.rank,
            world=world.size,
            start_position=progress.step * recipe.questions_in_a_step(),
            workers=workers,
            pin_memory=pin,
        )
    return JointBatches(of_pairs, of_questions)


def _views(plan: PreparedRun, learners: Learners, teachers: Mapping[str, AnyTeacher]) -> dict[str, TowerView]:
    assert plan.student is not None
    assert learners.student is not None
    live = live_teachers(plan, teachers)
    own = {"student": TowerView(learners.student.preprocess, plan.student.tokenize)}
    return own | {role: TowerView(preprocessing(model), model.tokenize) for role, model in live.items()}


def live_teachers(plan: PreparedRun, teachers: Mapping[str, AnyTeacher]) -> dict[str, clip.ModelSpec]:
    """Those that see images themselves."""
    known = plan.pairs.teachers if plan.pairs else {}
    return {role: known[role] for role, teacher in teachers.items() if not isinstance(teacher, StoredTeacher)}
