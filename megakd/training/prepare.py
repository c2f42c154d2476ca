"""Before a run: everything that can be wrong with settings, data or models' configurations, found before a model is loaded.

A recipe may name another that trains what it starts from: a teacher, a student, a decoder. Those runs come first; see `prerequisites`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megakd.data.sampler import Order
from megakd.data.shards import ShardSet
from megakd.data.store.reader import Store
from megakd.evaluation.suite import Sets, open_sets
from megakd.export import clip_folder, manifest
from megakd.export.warm_start import check_same_grid
from megakd.models import clip
from megakd.models.fingerprint import computation
from megakd.models.vlm import decoder, decoder_check, decoder_tokenizer, lora
from megakd.models.vlm.decoder import Decoder, DecoderSpec
from megakd.objectives.set import ObjectiveSet
from megakd.recipe import Answers, Recipe, Student, chain
from megakd.recipe import load as recipes
from megakd.runtime import collectives, ds_check, ds_config, files, precision, run_folder, zero3
from megakd.runtime.ds_config import DsConfig
from megakd.runtime.launch import World
from megakd.teachers import build
from megakd.vqa import check, evaluate
from megakd.vqa.prompts import PromptEncoder
from megakd.vqa.sets import Mixture, open_mixture, question_order


@dataclass(frozen=True)
class RunRequest:
    """A run as the command line asks for it."""

    recipe: Recipe
    recipe_name: str
    ds_config: str | None
    out: Path
    resume: str = "auto"


@dataclass(frozen=True)
class PairData:
    """What the objectives learn from: image-text pairs in their order, and the teachers of the recipe."""

    task: ObjectiveSet
    shards: ShardSet
    order: Order
    teachers: dict[str, clip.ModelSpec]
    store: Store | None


@dataclass(frozen=True)
class AnswerData:
    """What answers are learned from and judged by. outline: the decoder on torch's meta device, for the student's tower.

    notes: what the user should know of decoder and questions before the run: what is not covered, cut or left out.
    """

    decoder: DecoderSpec
    outline: Decoder
    train: Mixture
    order: Order
    sets: dict[str, evaluate.Opened]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PreparedRun:
    """A request whose settings, data and models' configurations were found to be sound. Nothing expensive has happened.

    student: None for a decoder that sees nothing. What is still to come is described as the recipe that will train it has it.
    """

    request: RunRequest
    config: DsConfig
    config_name: str
    student: clip.ModelSpec | None
    pairs: PairData | None
    questions: AnswerData | None
    sets: Sets

    @property
    def signature(self) -> int:
        """Of all training data: a position means something in the same data alone."""
        parts = [self.pairs.shards.signature] if self.pairs else []
        parts += [self.questions.train.signature] if self.questions else []
        return parts[0] if len(parts) == 1 else zlib.crc32(repr(parts).encode())

    @property
    def signature_of_names(self) -> int:
        """As `signature`, of the pairs' shards by name and length alone: what checkpoints of versions before 0.2 hold."""
        parts = [self.pairs.shards.signature_of_names] if self.pairs else []
        parts += [self.questions.train.signature] if self.questions else []
        return parts[0] if len(parts) == 1 else zlib.crc32(repr(parts).encode())


def prepare(request: RunRequest, world: World, to_come: frozenset[str] = frozenset()) -> PreparedRun:
    """Check everything that needs no model. Raises ValueError with key, value, file and remedy.

    to_come: of "teacher", "student" and "decoder" those that another recipe is about to train, so that they need not be there yet.
    """
    recipe = request.recipe
    raw, config_name = ds_config.read(request.ds_config, precision.of(world.device))
    config = ds_config.resolve(raw, recipe, world.size, config_name=config_name, recipe_name=request.recipe_name)
    ds_check.check(config, config_name)
    for teacher in recipe.teachers().values():
        if teacher.placement == "zero3":
            zero3.settings(teacher.ds_config, offload=teacher.offload)
    collectives.by_main(lambda: files.check_place(request.out, "--out"), world)
    run_folder.check_resume(request.out, request.resume, recipe)
    student = None if recipe.student is None else _student(recipe.student, "student" in to_come)
    pairs = _pairs(recipe, world, student, "teacher" not in to_come) if recipe.objectives.active() else None
    if pairs is not None and student is not None:
        described = student
        collectives.by_main(lambda: clip_folder.rehearse(described), world)
    _check_answers(recipe, config, world)
    questions = _answer_data(recipe, world, student, "decoder" in to_come)
    return PreparedRun(request, config, config_name, student, pairs, questions, open_sets(recipe, world))


def on_meta(description: clip.ModelSpec) -> clip.ClipModel:
    """The model's shapes, without one weight, on torch's meta device."""
    with torch.device("meta"):
        return clip.build(description, torch.device("meta"), load_weights=False)


def _student(settings: Student, is_to_come: bool) -> clip.ModelSpec:
    if not is_to_come:
        return clip.resolve(settings, "student")
    try:
        return clip.resolve(chain.model(settings, "student"), "student")
    except ValueError as error:
        raise ValueError(f"{error}\n(as recipe {settings.recipe!r}, which trains the student first, has it)") from error


def _pairs(recipe: Recipe, world: World, student: clip.ModelSpec | None, teacher_is_there: bool) -> PairData:
    task = ObjectiveSet(recipe, world.device, dist.group.WORLD if world.size > 1 else None)
    use_teacher = task.needs_teacher and teacher_is_there
    teachers = {role: clip.resolve(settings, role) for role, settings in recipe.teachers().items() if use_teacher}
    for model in (*([student] if student else []), *teachers.values()):
        task.check_bias(model.role, model.has_bias)
    for description in teachers.values():
        computation(description, world.device)  # a product of int8 that this machine lacks
    shards = ShardSet.open(recipe.data, world.rank, world.size, lambda: collectives.barrier(world))
    order = Order(len(shards), recipe.optim.batch, recipe.seed, recipe.data.block, recipe.data.window)
    return PairData(task, shards, order, teachers, build.open_stores(recipe, teachers, shards, world))


def _answer_data(recipe: Recipe, world: World, student: clip.ModelSpec | None, decoder_is_to_come: bool) -> AnswerData | None:
    if recipe.answers is None or recipe.decoder is None:
        return None
    description = decoder.resolve(chain.decoder(recipe.decoder) if decoder_is_to_come else recipe.decoder)
    outline = _outline(recipe.answers, description, student)
    _check_length(recipe, recipe.answers, description)
    collectives.by_main(lambda: decoder_tokenizer.check_export(description.tokenizer, description.config), world)
    notes = [decoder_check.check(description, outline.plain)]
    if outline.adapted:
        notes.append(lora.coverage(outline.language))
    if recipe.decoder.start is not None:
        start = Path(recipe.decoder.start)
        before = chain.before(recipe.decoder).model_dump() if decoder_is_to_come else manifest.read(start)["decoder"]
        if student is not None:
            check_same_grid(before, recipe.decoder, f"decoder.start = {str(start)!r}")
    train = open_mixture(recipe.answers.train, "answers.train", recipe.data, world.rank, world.size, lambda: collectives.barrier(world))
    order = question_order(train, recipe.questions_in_a_step(), recipe.seed)
    sets = evaluate.open_sets(recipe, world)
    notes += collectives.by_main(lambda: _tried_questions(recipe, outline, train, sets), world)
    return AnswerData(description, outline, train, order, sets, tuple(filter(None, notes)))


def _tried_questions(recipe: Recipe, outline: Decoder, train: Mixture, sets: dict[str, evaluate.Opened]) -> list[str]:
    """What the user should know of the questions' lengths and answers. Raises ValueError for sets of which too much is unusable."""
    assert recipe.answers is not None
    encoder = PromptEncoder(outline.tokenizer, outline.settings, outline.image_tokens, recipe.answers.max_length)
    has_images, most = outline.projector is not None, recipe.data.max_bad_fraction
    notes: list[str] = []
    for name, part in train.sets.items():
        key = f"answers.train.{name}"
        notes += check.try_training(part, encoder, has_images, key, most).sentences(key, learned=True)
    for name, opened in sets.items():
        key = f"evaluation.vqa.{name}"
        notes += check.try_prompts(opened.questions, encoder, has_images, key, most).sentences(key, learned=False)
    return notes


def _outline(answers: Answers, description: DecoderSpec, student: clip.ModelSpec | None) -> Decoder:
    """The decoder as it will be built for this tower. Raises ValueError for what does not fit: block, image tokens, conversations."""
    visual: Any = None if student is None else on_meta(student).clip.visual
    built = decoder.build(description, visual, torch.device("meta"))
    PromptEncoder(description.tokenizer, description.settings, built.image_tokens, answers.max_length)
    return built


def _check_answers(recipe: Recipe, config: DsConfig, world: World) -> None:
    if recipe.answers is None or recipe.decoder is None:
        return
    stage, rounds = config.stage, config.micro_batches
    if recipe.decoder.quantise != "none" and stage == 3:
        raise ValueError(
            f"decoder.quantise = {recipe.decoder.quantise!r}: ZeRO-3 would part what bitsandbytes reads as a whole; use stage 1 or 2"
        )
    batch = recipe.questions_in_a_step()
    if batch % world.size:
        raise ValueError(f"answers.batch = {batch} does not divide by {world.size} ranks: make it a multiple of the number of ranks")
    if batch < world.size * rounds:
        raise ValueError(
            f"answers.batch = {batch}: less than one question for each of {world.size} ranks x {rounds} accumulation steps; raise it to "
            f"{world.size * rounds} at least, or raise train_micro_batch_size_per_gpu"
        )


def _check_length(recipe: Recipe, answers: Answers, description: DecoderSpec) -> None:
    """A model with learned positions fails beyond its last; others only become worse."""
    generated = recipe.evaluation.answer_tokens if recipe.evaluation.vqa else 0
    if description.positions is not None and answers.max_length + generated > description.positions:
        raise ValueError(
            f"answers.max_length = {answers.max_length}{f' + evaluation.answer_tokens = {generated}' if generated else ''}: the language "
            f"model takes {description.positions} tokens (max_position_embeddings); set answers.max_length to "
            f"{description.positions - generated} at most"
        )


def prerequisites(request: RunRequest) -> list[RunRequest]:
    """The runs that must come first, in order: those whose folders the recipe names together with a recipe, and which are not there yet.

    Each may have such runs of its own. Raises ValueError when recipes wait for each other.
    """
    return _before(request, ())


def to_come(request: RunRequest) -> frozenset[str]:
    """Which of "teacher", "student" and "decoder" is not there yet and has a recipe that trains it."""
    return frozenset(role for role, _, _ in _missing(request.recipe))


def _before(request: RunRequest, waiting: tuple[Path, ...]) -> list[RunRequest]:
    if request.out in waiting:
        raise ValueError(f"recipe {request.recipe_name}: the runs wait for each other: {' -> '.join(map(str, (*waiting, request.out)))}")
    before: dict[Path, RunRequest] = {}
    for _, name, folder in _missing(request.recipe):
        recipe, origin = recipes.load(name)
        first = RunRequest(recipe, origin, request.ds_config, folder)
        before |= {earlier.out: earlier for earlier in (*_before(first, (*waiting, request.out)), first) if earlier.out not in before}
    return list(before.values())


def _missing(recipe: Recipe) -> list[tuple[str, str, Path]]:
    """(role, recipe, run folder) of what the recipe starts from, has a recipe for, and is not there."""
    roles: list[tuple[str, str, Path]] = []
    models = {"teacher": recipe.teacher if recipe.objectives.in_need_of_a_teacher() else None, "student": recipe.student}
    for role, settings in models.items():
        if settings is not None and settings.recipe is not None:
            folder = Path((settings.model or "").removeprefix("local-dir:"))
            if not (folder / chain.CLIP_CONFIG).is_file():
                roles.append((role, settings.recipe, folder.parent))
    decoder = recipe.decoder
    if decoder is not None and decoder.recipe is not None:
        folder = Path(decoder.start) if decoder.start is not None else Path(decoder.model or "").parent
        if not (folder / manifest.MANIFEST).is_file():
            roles.append(("decoder", decoder.recipe, folder.parent))
    return roles
