"""One run from a recipe to a finished folder: check everything cheap, build, resume, fit, evaluate, export.

The order matters: whatever can be wrong with settings, data or checkpoints is found before a model is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megakd import export, recipe_files, teaching
from megakd.data.loader import train_batches
from megakd.data.order import Order
from megakd.data.shards import ShardSet
from megakd.data.store import Store
from megakd.data.views import TowerView
from megakd.evaluation import report
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.suite import Sets, Suite, open_sets
from megakd.models import towers
from megakd.models.identity import preprocessing
from megakd.models.stored_teacher import StoredTeacher
from megakd.models.student import Student, decay_groups
from megakd.recipe import Recipe
from megakd.runtime import checkpoint, collectives, ds_config, launch, runlog, slurm_job, watchdog
from megakd.runtime.checkpoint import Progress
from megakd.runtime.engine import Engine, State
from megakd.runtime.launch import World
from megakd.runtime.locks import LOCK, FolderLock
from megakd.runtime.runlog import RunLog
from megakd.runtime.signals import EXIT_SAVED, LossNotFinite, StopRequest
from megakd.runtime.watchdog import HUNG, Watchdog
from megakd.tasks.distill import Distill
from megakd.trainer import AnyTeacher, Trainer

T = TypeVar("T")
EVALUATION, MODEL = "evaluation.json", "model"
# Seconds in which the ranks of a job that was just killed are gone, so that the same command may follow at once.
PATIENCE = 20.0


@dataclass(frozen=True)
class Request:
    """A run as the command line asks for it."""

    recipe: Recipe
    recipe_name: str
    ds_config: str | None
    out: Path
    resume: str = "auto"


@dataclass(frozen=True)
class Plan:
    """A request whose settings, data and models' configurations were found to be sound. Nothing expensive has happened."""

    request: Request
    config: dict[str, Any]
    config_name: str
    task: Distill
    shards: ShardSet
    order: Order
    student: towers.Description
    teachers: dict[str, towers.Description]
    store: Store | None
    sets: Sets


def prepare(request: Request, world: World, teacher_comes_first: bool = False) -> Plan:
    """Check everything that needs no model. Raises ValueError with key, value, file and remedy.

    teacher_comes_first: the teacher's folder is about to be trained by another recipe, so it need not be there yet.
    """
    recipe = request.recipe
    raw, config_name = ds_config.read(request.ds_config, cuda=world.device.type == "cuda")
    config = ds_config.resolve(raw, recipe, world.size, config_name=config_name, recipe_name=request.recipe_name)
    runlog.check_resume(request.out, request.resume, recipe)
    task = Distill(recipe, world.device, dist.group.WORLD if world.size > 1 else None)
    student = towers.describe(recipe.student, "student")
    use_teacher = task.needs_teacher and not teacher_comes_first
    teachers = {role: towers.describe(settings, role) for role, settings in recipe.teachers().items() if use_teacher}
    for model in (student, *teachers.values()):
        task.check_bias(model.role, model.has_bias)
    shards = ShardSet.open(recipe.data, world.rank, world.size, lambda: collectives.barrier(world))
    order = Order(len(shards), recipe.optim.batch, recipe.seed, recipe.data.block, recipe.data.window)
    store = teaching.open_stores(recipe, teachers, shards, world)
    return Plan(request, config, config_name, task, shards, order, student, teachers, store, open_sets(recipe, world))


def teacher_request(request: Request) -> Request | None:
    """The run that must come first: that of `teacher.recipe`, when its folder is not there yet."""
    teacher = request.recipe.teacher
    if teacher is None or teacher.recipe is None or not Distill.uses_teacher(request.recipe):
        return None
    folder = Path((teacher.model or "").removeprefix("local-dir:"))
    if (folder / towers.CONFIG_FILE).is_file():
        return None
    recipe, name = recipe_files.load(teacher.recipe)
    return Request(recipe, name, request.ds_config, folder.parent)


def _called(description: towers.Description) -> str:
    """A teacher's name for people, and how it runs."""
    settings = teaching.settings_of(description)
    how = f"from {settings.store}" if settings.store else settings.mode
    return f"{settings.model or 'own architecture'} ({how})"


class Run:
    """A plan in execution. Implements the trainer's hooks: what happens at checkpoints and evaluations."""

    def __init__(self, plan: Plan, world: World, stop: StopRequest) -> None:
        self.plan, self.world, self._stop = plan, world, stop
        self.recipe, self.folder = plan.request.recipe, plan.request.out
        self.log = RunLog(self.folder, main=world.is_main)

    def execute(self) -> int:
        """Train to the end and return the process's exit code: 0, or EXIT_SAVED after a signal.

        Raises ValueError, on every rank and before anything is written, when another job is at work in the run folder; OSError, on
        every rank, when the first one cannot write there.
        """
        with contextlib.ExitStack() as held:
            self._by_main(lambda: self._lock(held))
            held.enter_context(Watchdog(self.recipe.watchdog.limit, self.folder, self.world))
            launch.wait_longer_than(self.recipe.watchdog.limit)
            return self._execute()

    def _by_main(self, call: Callable[[], T]) -> T | None:
        """call() on rank 0, whose errors of a folder that cannot be used every rank raises; its result on rank 0, None elsewhere."""
        result, failure = None, None
        if self.world.is_main:
            try:
                result = call()
            except (ValueError, OSError, LossNotFinite) as error:
                failure = error
        heard = collectives.share(failure, self.world)
        if isinstance(heard, Exception):
            raise heard
        return result

    def _lock(self, held: contextlib.ExitStack) -> None:
        remedy = "end it first, or choose another --out"
        held.enter_context(FolderLock(self.folder, doing="is at work on this run now", remedy=remedy, patience=PATIENCE))
        # Stacks of an earlier start: the rank without a file would be looked for among all that were ever written.
        runlog.set_aside(self.folder, list(self.folder.glob(HUNG)))

    def _execute(self) -> int:
        self.log.say(f"{self.recipe.name}: run folder {self.folder}{self._job()}")
        progress, state = self._starting_point()
        self._by_main(lambda: self.log.open(self.recipe, self.plan.config, self.world.size))
        self.log.say(self._outline())
        self._build(state)
        del state
        launch.wait_longer_than(self.recipe.watchdog.limit)
        try:
            finished = progress.step >= self.recipe.optim.steps or self._fit(progress)
        finally:
            self.log.close()
        if not finished:
            self.log.say(f"stopped by a signal after saving; the same command goes on from there (exit code {EXIT_SAVED})")
            return EXIT_SAVED
        self._finish()
        return 0

    def _job(self) -> str:
        """What SLURM calls this run, for the first line of its log."""
        job = slurm_job.job_id(os.environ)
        return "" if job is None else f", SLURM job {job}, restart {slurm_job.restarts(os.environ)}"

    def _outline(self) -> str:
        """What is about to start, before the wait for models and DeepSpeed."""
        config, recipe = self.plan.config, self.recipe
        micro, rounds = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
        how = f"{self.world.size} x {self.world.device.type}, ZeRO {config.get('zero_optimization', {}).get('stage', 0)}"
        how += f", {'bf16' if ds_config.is_bf16(config) else 'fp32'}"
        how += f", batch {recipe.optim.batch} = {self.world.size} ranks x {rounds} x {micro}"
        teacher = ", ".join(map(_called, self.plan.teachers.values())) or "none"
        objectives = ", ".join(f"{weight:g} {name}" for name, weight in self.plan.task.weights.items())
        return f"{recipe.optim.steps} steps, {how}\ndata: {len(self.plan.shards)} pairs; teacher: {teacher}; objectives: {objectives}"

    def _finish(self) -> None:
        weights = self._engine.export(moments=False, everywhere=True).weights
        self._score(weights, self.recipe.optim.steps)
        self._by_main(lambda: self._write_model(weights))

    def _write_model(self, weights: dict[str, Tensor]) -> None:
        if self.log.failure is not None:
            raise self.log.failure
        export.write_model(self.folder / MODEL, weights, self._student_towers)
        self.log.say(f"done: {self.folder}")

    def _starting_point(self) -> tuple[Progress, State | None]:
        """Where to go on. Rank 0 looks and clears the way, then all ranks read the same checkpoint."""
        path = collectives.share(self._by_main(self._choose_checkpoint), self.world)
        if path is None:
            self._by_main(lambda: self.log.keep_until(0))
            return Progress(0, 0, self.recipe.seed, self.plan.shards.signature), None
        assert isinstance(path, Path)
        self._resumed_from = path
        progress, state = checkpoint.load(path)
        if progress.data != self.plan.shards.signature:
            raise ValueError(
                f"data.train = {self.recipe.data.train!r}: the shards have changed since {path} was written, so its position in them means "
                f"nothing; put the same shards back, or start over with --resume none or another --out"
            )
        self.log.say(f"resuming from {path}: step {progress.step} of {self.recipe.optim.steps}")
        self._by_main(lambda: self.log.keep_until(progress.step))
        return progress, state

    def _choose_checkpoint(self) -> Path | None:
        resume = self.plan.request.resume
        if resume == "none":
            earlier = [entry for entry in self.folder.glob("*") if entry.name not in ("previous", LOCK)]
            if aside := runlog.set_aside(self.folder, earlier):
                self.log.say(f"--resume none: the earlier run in {self.folder} was moved to {aside}")
            return None
        if resume == "auto":
            path = checkpoint.latest_valid(self.folder, self.log.say)
        else:
            path = Path(resume)
            checkpoint.load_weights(path)  # refuses a damaged one before anything is moved for it
        # What is newer than the chosen one is damaged or given up; left in place, it would be taken for this run's future.
        newer = [entry for entry in checkpoint.available(self.folder) if path is None or entry.name > path.name]
        if aside := runlog.set_aside(self.folder, newer):
            self.log.say(f"{len(newer)} checkpoints newer than the one to resume from were moved to {aside}")
        return path

    def _build(self, state: State | None) -> None:
        recipe, device = self.recipe, self.world.device
        # pretrained = "random" draws: the same on every rank and at every start, and not what a student of equal shape draws.
        torch.manual_seed(recipe.seed + 1)
        self._teachers = self._build_teachers()
        watchdog.beat("building the student")
        torch.manual_seed(recipe.seed)
        self._student_towers = towers.build(self.plan.student, torch.device("cpu"))
        # Evaluation works on a plain replica: a ZeRO-3 student has its weights only inside the engine's forward.
        self._replica = copy.deepcopy(self._student_towers.clip) if self.plan.sets else None
        if recipe.student.activation_checkpointing:
            self._student_towers.clip.set_grad_checkpointing(True)  # type: ignore[operator]
        heads = self.plan.task.heads(self.plan.student.width, [teacher.width for teacher in self._teachers.values()])
        student = Student(self._student_towers.clip, heads, recipe.student.max_scale)
        if state is not None:
            checkpoint.check_fits(self._resumed_from, state.weights, {k: tuple(v.shape) for k, v in student.state_dict().items()})
        groups = decay_groups(student, recipe.optim.weight_decay)
        self._engine = Engine(student.to(device), groups, recipe.optim, self.plan.config, self.world, state)

    def _build_teachers(self) -> dict[str, AnyTeacher]:
        if self.recipe.teacher is not None and not self.plan.teachers:
            self.log.say("the teacher is not loaded: no objective with a positive weight uses it")
        built: dict[str, AnyTeacher] = {}
        for role, description in self.plan.teachers.items():
            watchdog.beat(f"loading {role}")
            if self.plan.store is not None:
                self.log.say(self.plan.store.outline())
                piece = self.plan.config["train_micro_batch_size_per_gpu"]
                built[role] = teaching.stored_teacher(self.plan.store, self.recipe, description, self.plan.shards, self.world, piece=piece)
            else:
                built[role] = teaching.live_teacher(self.recipe, description, self.world)
        return built

    def _fit(self, progress: Progress) -> bool:
        live = {role: self.plan.teachers[role] for role, teacher in self._teachers.items() if not isinstance(teacher, StoredTeacher)}
        preprocess = {"student": self._student_towers.preprocess} | {role: preprocessing(found) for role, found in live.items()}
        tokenize = {"student": self.plan.student.tokenize} | {role: found.tokenize for role, found in live.items()}
        views = {name: TowerView(cfg, tokenize[name]) for name, cfg in preprocess.items()}
        trainer = Trainer(self.recipe, self.world, self._engine, self.plan.task, self._teachers, preprocess, self.log, self._stop)
        batches = train_batches(
            self.plan.shards,
            self.plan.order,
            self.recipe.views,
            views,
            rank=self.world.rank,
            world=self.world.size,
            start_position=progress.position,
            workers=self.recipe.data.workers,
            pin_memory=self.world.device.type == "cuda",
            store=self.plan.store,
            replay=self.recipe.teacher is not None and self.recipe.teacher.store_of == "all",
        )
        with batches:
            return trainer.fit(batches, progress, self)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; every rank learns whether it is there before it goes on."""
        watchdog.beat("saving a checkpoint", progress.step)
        state = self._engine.export(moments=True, everywhere=False)
        self._by_main(lambda: self._write_checkpoint(progress, state))

    def _write_checkpoint(self, progress: Progress, state: State) -> None:
        if self.log.failure is not None:
            raise self.log.failure  # a run that goes on from here would lack that row
        checkpoint.save(self.folder, progress, state, self.recipe.checkpoint.keep)

    def evaluate(self, step: int) -> None:
        """Score the current weights on the recipe's sets, into metrics.jsonl and evaluation.json."""
        if self._replica is not None:
            self._score(self._engine.export(moments=False, everywhere=True).weights, step)

    def _score(self, weights: dict[str, Tensor], step: int) -> None:
        if self._replica is None:
            return
        watchdog.beat("evaluating", step)
        export.load_clip(self._replica, weights)
        clip = self._replica.to(self.world.device).eval()
        encoder = Encoder(
            clip, self._student_towers.preprocess, self.plan.student.tokenize, self.world.device, self.recipe.evaluation.batch
        )
        results = {"step": step, **Suite(self.plan.sets, encoder, self.world, self.recipe.data.workers).run()}
        self._replica.to("cpu")
        self._by_main(lambda: self._write_evaluation(results))

    def _write_evaluation(self, results: dict[str, Any]) -> None:
        runlog.write_json(self.folder / EVALUATION, results)
        self.log.event(results["step"], "evaluation", results)
        self.log.say(report.lines(results))
