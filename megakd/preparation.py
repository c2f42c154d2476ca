"""Before a run: everything that can be wrong with settings, data or models' configurations, found before a model is loaded.

A recipe may name another that trains what it starts from: a teacher, a student, a decoder. Those runs come first; see `prerequisites`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megakd import bundle_files, recipe_files, teaching
from megakd.data.order import Order
from megakd.data.questions import Mixture, open_mixture, question_order
from megakd.data.shards import ShardSet
from megakd.data.store import Store
from megakd.evaluation import vqa
from megakd.evaluation.suite import Sets, open_sets
from megakd.models import decoder, towers
from megakd.models.decoder import DecoderDescription
from megakd.recipe import Recipe
from megakd.runtime import collectives, ds_config, runlog
from megakd.runtime.launch import World
from megakd.tasks.distill import Distill


@dataclass(frozen=True)
class Request:
    """A run as the command line asks for it."""

    recipe: Recipe
    recipe_name: str
    ds_config: str | None
    out: Path
    resume: str = "auto"


@dataclass(frozen=True)
class Pairs:
    """What the objectives learn from: image-text pairs in their order, and the teachers of the recipe."""

    task: Distill
    shards: ShardSet
    order: Order
    teachers: dict[str, towers.Description]
    store: Store | None


@dataclass(frozen=True)
class Asking:
    """What answers are learned from and judged by. decoder: None while the run that trains it is still to come."""

    decoder: DecoderDescription | None
    train: Mixture
    order: Order
    sets: dict[str, vqa.Opened]


@dataclass(frozen=True)
class Plan:
    """A request whose settings, data and models' configurations were found to be sound. Nothing expensive has happened.

    student: None for a decoder that sees nothing, and while the run that trains the student is still to come.
    """

    request: Request
    config: dict[str, Any]
    config_name: str
    student: towers.Description | None
    pairs: Pairs | None
    asking: Asking | None
    sets: Sets

    @property
    def signature(self) -> int:
        """Of all training data: a position means something in the same data alone."""
        parts = [self.pairs.shards.signature] if self.pairs else []
        parts += [self.asking.train.signature] if self.asking else []
        return parts[0] if len(parts) == 1 else zlib.crc32(repr(parts).encode())


def prepare(request: Request, world: World, to_come: frozenset[str] = frozenset()) -> Plan:
    """Check everything that needs no model. Raises ValueError with key, value, file and remedy.

    to_come: of "teacher", "student" and "decoder" those that another recipe is about to train, so that they need not be there yet.
    """
    recipe = request.recipe
    raw, config_name = ds_config.read(request.ds_config, cuda=world.device.type == "cuda")
    config = ds_config.resolve(raw, recipe, world.size, config_name=config_name, recipe_name=request.recipe_name)
    runlog.check_resume(request.out, request.resume, recipe)
    known = recipe.student is not None and "student" not in to_come
    student = towers.describe(recipe.student, "student") if known and recipe.student is not None else None
    pairs = _pairs(recipe, world, student, "teacher" not in to_come) if recipe.objectives.active() else None
    asking = _asking(recipe, world, "decoder" not in to_come)
    _check_answers(recipe, config, world)
    _check_length(recipe, asking)
    return Plan(request, config, config_name, student, pairs, asking, open_sets(recipe, world))


def _pairs(recipe: Recipe, world: World, student: towers.Description | None, teacher_is_there: bool) -> Pairs:
    task = Distill(recipe, world.device, dist.group.WORLD if world.size > 1 else None)
    use_teacher = task.needs_teacher and teacher_is_there
    teachers = {role: towers.describe(settings, role) for role, settings in recipe.teachers().items() if use_teacher}
    for model in (*([student] if student else []), *teachers.values()):
        task.check_bias(model.role, model.has_bias)
    shards = ShardSet.open(recipe.data, world.rank, world.size, lambda: collectives.barrier(world))
    order = Order(len(shards), recipe.optim.batch, recipe.seed, recipe.data.block, recipe.data.window)
    return Pairs(task, shards, order, teachers, teaching.open_stores(recipe, teachers, shards, world))


def _asking(recipe: Recipe, world: World, decoder_is_there: bool) -> Asking | None:
    if recipe.answers is None or recipe.decoder is None:
        return None
    description = decoder.describe(recipe.decoder) if decoder_is_there else None
    if decoder_is_there and recipe.decoder.start is not None:
        bundle_files.read(Path(recipe.decoder.start))
    train = open_mixture(recipe.answers.train, "answers.train", recipe.data, world.rank, world.size, lambda: collectives.barrier(world))
    order = question_order(train, questions_in_a_step(recipe), recipe.seed)
    return Asking(description, train, order, vqa.open_sets(recipe, world))


def _check_answers(recipe: Recipe, config: dict[str, Any], world: World) -> None:
    if recipe.answers is None or recipe.decoder is None:
        return
    stage, rounds = config.get("zero_optimization", {}).get("stage", 0), config["gradient_accumulation_steps"]
    if recipe.decoder.quantise != "none" and stage == 3:
        raise ValueError(
            f"decoder.quantise = {recipe.decoder.quantise!r}: ZeRO-3 would part what bitsandbytes reads as a whole; use stage 1 or 2"
        )
    batch = questions_in_a_step(recipe)
    if batch % world.size:
        raise ValueError(f"answers.batch = {batch} does not divide by {world.size} ranks: make it a multiple of the number of ranks")
    if batch < world.size * rounds:
        raise ValueError(
            f"answers.batch = {batch}: less than one question for each of {world.size} ranks x {rounds} accumulation steps; raise it to "
            f"{world.size * rounds} at least, or raise train_micro_batch_size_per_gpu"
        )


def _check_length(recipe: Recipe, asking: Asking | None) -> None:
    """A model with learned positions fails beyond its last; others only become worse."""
    if asking is None or asking.decoder is None or recipe.answers is None or asking.decoder.positions is None:
        return
    generated = recipe.evaluation.answer_tokens if recipe.evaluation.vqa else 0
    if recipe.answers.max_length + generated > asking.decoder.positions:
        raise ValueError(
            f"answers.max_length = {recipe.answers.max_length}{f' + evaluation.answer_tokens = {generated}' if generated else ''}: the "
            f"language model takes {asking.decoder.positions} tokens (max_position_embeddings); set answers.max_length to "
            f"{asking.decoder.positions - generated} at most"
        )


def questions_in_a_step(recipe: Recipe) -> int:
    """Over all ranks."""
    assert recipe.answers is not None
    return recipe.answers.batch or recipe.optim.batch


def prerequisites(request: Request) -> list[Request]:
    """The runs that must come first, in order: those whose folders the recipe names together with a recipe, and which are not there yet.

    Each may have such runs of its own. Raises ValueError when recipes wait for each other.
    """
    return _before(request, ())


def to_come(request: Request) -> frozenset[str]:
    """Which of "teacher", "student" and "decoder" is not there yet and has a recipe that trains it."""
    return frozenset(role for role, _, _ in _missing(request.recipe))


def _before(request: Request, waiting: tuple[Path, ...]) -> list[Request]:
    if request.out in waiting:
        raise ValueError(f"recipe {request.recipe_name}: the runs wait for each other: {' -> '.join(map(str, (*waiting, request.out)))}")
    found: dict[Path, Request] = {}
    for _, name, folder in _missing(request.recipe):
        recipe, origin = recipe_files.load(name)
        first = Request(recipe, origin, request.ds_config, folder)
        found |= {earlier.out: earlier for earlier in (*_before(first, (*waiting, request.out)), first) if earlier.out not in found}
    return list(found.values())


def _missing(recipe: Recipe) -> list[tuple[str, str, Path]]:
    """(role, recipe, run folder) of what the recipe starts from, has a recipe for, and is not there."""
    roles: list[tuple[str, str, Path]] = []
    models = {"teacher": recipe.teacher if Distill.uses_teacher(recipe) else None, "student": recipe.student}
    for role, settings in models.items():
        if settings is not None and settings.recipe is not None:
            folder = Path((settings.model or "").removeprefix("local-dir:"))
            if not (folder / towers.CONFIG_FILE).is_file():
                roles.append((role, settings.recipe, folder.parent))
    decoder = recipe.decoder
    if decoder is not None and decoder.recipe is not None:
        folder = Path(decoder.start) if decoder.start is not None else Path(decoder.model or "").parent
        if not (folder / bundle_files.MANIFEST).is_file():
            roles.append(("decoder", decoder.recipe, folder.parent))
    return roles
