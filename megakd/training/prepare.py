"""Before a run: everything that can be wrong with settings, data or models' configurations, found before a model is loaded.

A recipe may name another that trains what it starts from: a teacher, a student, a decoder. Those runs come first; see `prerequisites`.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megakd.export import manifest
from megakd.models import clip
from megakd.models.start.plan import Start
from megakd.models.start.sources import start_of
from megakd.recipe import Recipe, Student, chain, texts
from megakd.recipe import load as recipes
from megakd.runtime import checkpoint, collectives, ds_check, ds_config, files, precision, run_folder
from megakd.runtime.ds_config import DsConfig
from megakd.runtime.launch import World
from megakd.teachers.build import class_of
from megakd.training import learning
from megakd.training.tasks import distill
from megakd.training.tasks.base import TaskData


@dataclass(frozen=True)
class RunRequest:
    """A run as the command line asks for it."""

    recipe: Recipe
    recipe_name: str
    ds_config: str | None
    out: Path
    resume: str = "auto"


@dataclass(frozen=True)
class PreparedRun:
    """A request whose settings, data and models' configurations were found to be sound. Nothing expensive has happened.

    student: None for a decoder that sees nothing. What is still to come is described as the recipe that will train it has it.
    tasks: at least one; the position of the first one's data is a checkpoint's.
    start: what the student begins with; None without a student, for one that another recipe is about to train, and for a run that goes
    on from a checkpoint, see `with_start`.
    learning: which parts of the student learn and how fast, in words, where they do not learn alike.
    """

    request: RunRequest
    config: DsConfig
    config_name: str
    student: clip.ModelSpec | None
    tasks: tuple[TaskData, ...]
    start: Start | None = None
    learning: list[str] = field(default_factory=list)

    @property
    def is_scored(self) -> bool:
        """Whether there are sets to evaluate what is trained on."""
        return any(task.sets for task in self.tasks)

    def signature(self, *, of_names: bool = False) -> int:
        """Of all training data: a position means something in the same data alone.

        of_names: of the pairs' shards by name and length alone, which is what checkpoints of versions before 0.2 hold.
        """
        parts = [task.signature(of_names=of_names) for task in self.tasks]
        return parts[0] if len(parts) == 1 else zlib.crc32(repr(parts).encode())


def prepare(request: RunRequest, world: World, to_come: frozenset[str] = frozenset()) -> PreparedRun:
    """Check everything that needs no model. Raises ValueError with key, value, file and remedy.

    to_come: of "teacher", "student", "decoder" and "answers.teacher" those that another recipe is about to train, so that they need not
    be there yet.
    """
    recipe = request.recipe
    raw, config_name = ds_config.read(request.ds_config, precision.of(world.device))
    config = ds_config.resolve(raw, recipe, world.size, config_name=config_name, recipe_name=request.recipe_name)
    ds_check.check(config, config_name)
    for teacher in recipe.teachers().values():
        class_of(teacher.placement).check(teacher)
    collectives.by_main(lambda: files.check_place(request.out, "--out"), world)
    recipe = run_folder.check_resume(request.out, request.resume, recipe)
    settings = chain.with_text(recipe)
    student = None if settings is None else _student(settings, "student" in to_come)
    start = None
    if student is not None and "student" not in to_come and not _goes_on(request):
        start = start_of(recipe, student)
        collectives.by_main(start.look, world)
    tasks: list[TaskData] = []
    heads = None
    if recipe.active() and student is not None:
        pairs = distill.prepare(recipe, world, student, to_come="teacher" in to_come)
        tasks.append(pairs)
        heads = None if "teacher" in to_come else pairs.outline_heads
    if recipe.answers is not None and recipe.decoder is not None:
        from megakd.training.tasks import answer  # with transformers' models, a second that a run without a decoder need not wait

        tasks.append(answer.prepare(recipe, recipe.answers, recipe.decoder, config, world, student, to_come))
    learns = learning.check(recipe, student, heads)
    return PreparedRun(replace(request, recipe=recipe), config, config_name, student, tuple(tasks), start, learns)


def _goes_on(request: RunRequest) -> bool:
    return request.resume not in ("auto", "none") or (request.resume == "auto" and bool(checkpoint.available(request.out)))


def with_start(plan: PreparedRun, have: Collection[str], world: World) -> PreparedRun:
    """The plan with what the student begins with, on this machine's disk, or without it where `have` is the whole student. A collective.

    have: names of a checkpoint's tensors. Raises ValueError, on every rank, naming the key, where weights do not come or do not fit.
    """
    if plan.student is None:
        return plan
    with torch.random.fork_rng(devices=[]):
        names = {f"clip.{name}" for name in clip.on_meta(plan.student).clip.state_dict()}
    if names <= set(have):
        return replace(plan, start=None)
    start = plan.start or start_of(plan.request.recipe, plan.student)
    collectives.by_main(start.fetch, world)
    return replace(plan, start=start)


def _student(settings: Student, is_to_come: bool) -> clip.ModelSpec:
    if not is_to_come:
        return clip.resolve(settings, "student")
    try:
        return clip.resolve(chain.model(settings, "student"), "student")
    except ValueError as error:
        raise ValueError(f"{error}\n(as recipe {settings.recipe!r}, which trains the student first, has it)") from error


def prerequisites(request: RunRequest) -> list[RunRequest]:
    """The runs that must come first, in order: those whose folders the recipe names together with a recipe, and which are not there yet.

    Each may have such runs of its own. Raises ValueError when recipes wait for each other.
    """
    return _before(request, ())


def to_come(request: RunRequest) -> frozenset[str]:
    """Which of "teacher", "student", "decoder" and "answers.teacher" is not there yet and has a recipe that trains it."""
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
    models = {
        "teacher": recipe.weighted_teachers().get("teacher") if recipe.in_need_of_a_teacher() else None,
        "student": recipe.student,
    }
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
    teacher = None if recipe.answers is None else recipe.answers.teacher
    if teacher is not None and teacher.recipe is not None and not texts.exists(Path(teacher.bundle) / manifest.MANIFEST):
        roles.append(("answers.teacher", teacher.recipe, Path(teacher.bundle).parent))
    return roles
