"""One run from a plan to a finished folder: resume, build, fit, evaluate, export. What can be checked before is in `prepare.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megakd.evaluation import report
from megakd.evaluation.sets import sets_of
from megakd.export import clip_folder
from megakd.export.bundle import Bundle
from megakd.models import clip
from megakd.models.fingerprint import preprocessing, weights_file
from megakd.models.vlm import lora
from megakd.models.vlm.student import VisionLanguageStudent
from megakd.objectives.answers import Answer
from megakd.objectives.set import StepLosses
from megakd.runtime import (
    checkpoint,
    collectives,
    engine,
    environment,
    files,
    launch,
    monitors,
    precision,
    run_folder,
    shared_folder,
    watchdog,
)
from megakd.runtime.checkpoint import Progress
from megakd.runtime.engine import Engine, State, trained_shapes
from megakd.runtime.exits import EXIT_SAVED, Interrupted
from megakd.runtime.launch import World
from megakd.runtime.locks import LOCK, FolderLock
from megakd.runtime.preemption import StopPoller, StopRequest
from megakd.runtime.run_folder import RunLog
from megakd.runtime.watchdog import HUNG, HangWatchdog
from megakd.teachers import build as teacher_build
from megakd.training import build
from megakd.training.evaluate import Evaluator
from megakd.training.prepare import PreparedRun
from megakd.training.trainer import Trainer
from megakd.vqa import check
from megakd.vqa import evaluate as vqa_evaluate

T = TypeVar("T")
MODEL, BUNDLE = "model", "bundle"
# Seconds in which the ranks of a job that was just killed are gone, so that the same command may follow at once.
LOCK_SECONDS = 20.0
_COMPARED = 20  # questions on which the bundle's tokenizer is compared with the run's


def _called(description: clip.ModelSpec) -> str:
    """A teacher's name for people, and how it runs."""
    settings = teacher_build.settings_of(description)
    how = f"from {settings.store}" if settings.store else settings.mode
    return f"{settings.model or 'own architecture'} ({how})"


class Run:
    """A plan in execution. Implements the trainer's hooks: what happens at checkpoints and evaluations."""

    def __init__(self, plan: PreparedRun, world: World, stop: StopRequest) -> None:
        self.plan, self.world, self._stop = plan, world, stop
        self.recipe, self.folder = plan.request.recipe, plan.request.out
        self.log = RunLog(self.folder, main=world.is_main)
        self._is_built = False

    def execute(self) -> int:
        """Train to the end and return the process's exit code: 0, or EXIT_SAVED after a signal.

        Raises ValueError, on every rank and before anything is written, when another job is at work in the run folder; OSError, on
        every rank, when the first one cannot write there.
        """
        with contextlib.ExitStack() as held:
            collectives.by_main(lambda: self._lock(held), self.world)
            for line in shared_folder.check(self.folder, self.world):
                self.log.say(line)
            held.enter_context(HangWatchdog(self.recipe.watchdog.limit, self.folder, self.world))
            launch.wait_longer_than(self.recipe.watchdog.limit)
            code = self._execute()
            if self._is_built:
                self._release()
            return code

    def _release(self) -> None:
        """Make room for the run that may follow in this process. After an error none does, and this could wait for a device that hangs."""
        self._engine.close()
        engine.forget()
        del self._engine, self._evaluator, self._learners, self._teachers
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _lock(self, held: contextlib.ExitStack) -> None:
        remedy = "end it first, or choose another --out"
        held.enter_context(FolderLock(self.folder, doing="is at work on this run now", remedy=remedy, timeout=LOCK_SECONDS))
        if left := files.clear(self.folder, checkpoint.folder_of(self.folder), self.folder / vqa_evaluate.ANSWERS):
            names = ", ".join(path.name for path in left[:4]) + f" and {len(left) - 4} more" * (len(left) > 4)
            self.log.say(f"{self.folder}: cleared what an earlier start had half written or half removed: {names}")
        # Stacks of an earlier start: the rank without a file would be looked for among all that were ever written.
        run_folder.archive(self.folder, list(self.folder.glob(HUNG)))

    def _execute(self) -> int:
        self.log.say(f"{self.recipe.name}: run folder {self.folder}{self._job()}")
        changed = [] if self.plan.request.resume == "none" else collectives.by_main(self._changes, self.world)
        progress, state = self._starting_point()
        if state is not None:
            for line in changed:
                self.log.say(line)
        self._go_on_in_monitors(progress)
        collectives.by_main(lambda: self.log.open(self.recipe, self.plan.config, self.world.size), self.world)
        if self._has_finished(progress):
            self.log.say(f"this run has ended before: its scores are in {self.folder / run_folder.EVALUATION}")
            self._say_done()
            return 0
        self.log.say(self._outline())
        self._build(state)
        self._is_built = True
        del state
        launch.wait_longer_than(self.recipe.watchdog.limit)
        try:
            self._train_and_finish(progress)
        except Interrupted:
            self.log.say(f"stopped by a signal after saving; the same command goes on from there (exit code {EXIT_SAVED})")
            return EXIT_SAVED
        return 0

    def _changes(self) -> list[str]:
        return run_folder.changes(self.folder, self.recipe)

    def _go_on_in_monitors(self, progress: Progress) -> None:
        samples = progress.step * self.recipe.samples_in_a_step()
        begun = collectives.by_main((self.folder / run_folder.METRICS).exists, self.world)
        evaluated = begun and self.evaluated(progress.step)
        for line in collectives.by_main(lambda: monitors.go_on(self.plan.config, self.folder, samples, evaluated=evaluated), self.world):
            self.log.say(line)

    def _train_and_finish(self, progress: Progress) -> None:
        try:
            if progress.step < self.recipe.optim.steps:
                self._fit(progress)
        finally:
            self.log.close()
        self._finish()

    def _job(self) -> str:
        """What SLURM calls this run, for the first line of its log."""
        job = environment.job_id(os.environ)
        return "" if job is None else f", SLURM job {job}, restart {environment.restarts(os.environ)}"

    def _outline(self) -> str:
        """What is about to start, before the wait for models and DeepSpeed."""
        config, recipe = self.plan.config, self.recipe
        how = f"{self.world.size} x {self.world.device.type}, ZeRO {config.stage}, {config.precision}"
        if (forced := precision.asked()) is not None:
            how += f" ({precision.VARIABLE}={forced})"
        if config.accumulates_in_bf16:
            how += " (gradients add up in bf16, as data_types.grad_accum_dtype says: fp32 loses nothing)"
        if self.plan.pairs is not None:
            how += f", batch {recipe.optim.batch} = {self.world.size} ranks x {config.micro_batches} x {config.micro_batch}"
        return f"{recipe.optim.steps} steps, {how}\n{self._sources()}"

    def _sources(self) -> str:
        pairs, questions = self.plan.pairs, self.plan.questions
        parts = []
        if pairs is not None:
            teacher = ", ".join(map(_called, pairs.teachers.values())) or "none"
            objectives = ", ".join(f"{weight:g} {name}" for name, weight in pairs.task.weights.items())
            parts.append(f"data: {len(pairs.shards)} pairs; teacher: {teacher}; objectives: {objectives}")
        if questions is not None and self.recipe.answers is not None and self.recipe.decoder is not None:
            tower = "no tower" if self.recipe.student is None else f"{self.recipe.answers.tower} tower"
            adapted = {"lora": "LoRA", "none": "frozen", "full": "all weights"}[self.recipe.decoder.adapt]
            batch = f"batch {self.recipe.questions_in_a_step()}"
            weight = f"weight {self.recipe.answers.weight:g}"
            parts.append(f"questions: {len(questions.train)}, {batch}, {weight}; {tower}; decoder: {adapted}")
            parts += questions.notes
        return "\n".join(parts)

    def _finish(self) -> None:
        """What was trained is written before it is scored: an evaluation may take hours, and fail."""
        steps = self.recipe.optim.steps
        weights = self._engine.export(moments=False, everywhere=False).weights
        collectives.by_main(lambda: self._write_results(weights), self.world)
        try:
            if not self.evaluated(steps):
                self.evaluate(steps)
        except ValueError as error:
            written = " and ".join(str(self.folder / name) for name in self._results())
            raise ValueError(
                f"{error}\nTraining is done and kept in {written}; once this is put right, the same command evaluates it"
            ) from error
        self._say_done()

    def _say_done(self) -> None:
        self.log.say(f"done: {self.folder}")

    def _results(self) -> list[str]:
        """What a finished run leaves, by name."""
        model = [MODEL] if self.plan.pairs is not None and self.recipe.student is not None else []
        return model + ([BUNDLE] if self.plan.questions is not None else [])

    def _has_finished(self, progress: Progress) -> bool:
        """Whether an earlier start has come to the end: everything is written and scored on these sets. A collective."""
        if progress.step < self.recipe.optim.steps or not self._is_scored():
            return False
        return self.evaluated(progress.step) and collectives.by_main(self._has_results, self.world)

    def _has_results(self) -> bool:
        return all((self.folder / name).is_dir() for name in self._results())

    def _is_scored(self) -> bool:
        return bool(self.plan.sets) or bool(self.plan.questions and self.plan.questions.sets)

    def _write_results(self, weights: dict[str, Tensor]) -> None:
        if self.log.failure is not None:
            raise self.log.failure
        student = self._learners.student
        if self.plan.pairs is not None and student is not None:
            clip_folder.write_model(self.folder / MODEL, weights, student)
        if self.plan.questions is not None:
            self._write_bundle(weights)

    def _write_bundle(self, weights: dict[str, Tensor]) -> None:
        answers, student, questions = self.recipe.answers, self._learners.student, self.plan.questions
        assert answers is not None
        assert questions is not None
        trained = self.plan.pairs is not None or answers.tower == "trained"
        known = student is not None and student.description.settings.pretrained != clip.RANDOM
        loaded = known and student is not None and weights_file(student.description) is not None
        texts = [text for one in check.examples(questions.train, _COMPARED) for text in (one.text, one.answer)]
        with self._evaluator.learned(self._engine, weights) as module:
            # what the engine holds may be in parts
            whole = None if student is None else dataclasses.replace(student, clip=module.clip)
            made = Bundle(module.decoder, whole, answers.max_length)
            made.save(self.folder / BUNDLE, tower_inside=trained or not loaded, samples=texts)

    def _starting_point(self) -> tuple[Progress, State | None]:
        """Where to go on. Rank 0 looks and clears the way, then all ranks read the same checkpoint."""
        path = collectives.by_main(self._choose_checkpoint, self.world)
        if path is None:
            collectives.by_main(lambda: self.log.keep_until(0), self.world)
            return Progress(0, 0, self.recipe.seed, self.plan.signature), None
        assert isinstance(path, Path)
        self._resumed_from = path
        progress, state = checkpoint.load(path)
        if progress.step > self.recipe.optim.steps:
            raise ValueError(
                f"optim.steps = {self.recipe.optim.steps}: {path} has {progress.step} steps behind it; give that many at least, or start "
                f"over with --resume none or another --out"
            )
        if progress.seed != self.recipe.seed:
            raise ValueError(
                f"seed = {self.recipe.seed}: {path} was written with seed {progress.seed}, and the order of the data follows from it; give "
                f"--set seed={progress.seed}, or start over with --resume none or another --out"
            )
        if progress.position != progress.step * self.recipe.samples_in_a_step():
            raise ValueError(
                f"{path}: stands at sample {progress.position} after {progress.step} steps, which steps of "
                f"{self.recipe.samples_in_a_step()} do not come to; resume with the batch it was made with or from another checkpoint, or "
                f"start over with --resume none"
            )
        if progress.data == self.plan.signature_of_names != self.plan.signature:
            self.log.say(f"{path} knows its shards by name and length alone: whether their content is still the same was not looked at")
            progress = dataclasses.replace(progress, data=self.plan.signature)
        if progress.data != self.plan.signature:
            raise ValueError(
                f"{self._data()}: the data have changed since {path} was written, so its position in them means nothing; "
                f"put the same shards and questions back, or start over with --resume none or another --out"
            )
        self.log.say(f"resuming from {path}: step {progress.step} of {self.recipe.optim.steps}")
        collectives.by_main(lambda: self.log.keep_until(progress.step), self.world)
        return progress, state

    def _choose_checkpoint(self) -> Path | None:
        resume = self.plan.request.resume
        if resume == "none":
            earlier = [entry for entry in self.folder.glob("*") if entry.name not in ("previous", LOCK, environment.SUBMISSIONS)]
            if aside := run_folder.archive(self.folder, earlier):
                self.log.say(f"--resume none: the earlier run in {self.folder} was moved to {aside}")
            return None
        if resume == "auto":
            path = checkpoint.latest_valid(self.folder, self.log.say)
        else:
            path = Path(resume)
            checkpoint.load(path)  # refuses a damaged one before anything is moved for it
        # What is newer than the chosen one is damaged or given up; left in place, it would be taken for this run's future.
        newer = [entry for entry in checkpoint.available(self.folder) if path is None or entry.name > path.name]
        if aside := run_folder.archive(self.folder, newer):
            self.log.say(f"{len(newer)} checkpoints newer than the one to resume from were moved to {aside}")
        checkpoint.prune(self.folder, self.recipe.checkpoint.keep)
        return path

    def _data(self) -> str:
        parts = [f"data.train = {self.recipe.data.train!r}"] if self.plan.pairs else []
        return " and ".join(parts + (["answers.train"] if self.plan.questions else []))

    def _build(self, state: State | None) -> None:
        recipe, device = self.recipe, self.world.device
        # pretrained = "random" draws: the same on every rank and at every start, and not what a student of equal shape draws.
        torch.manual_seed(recipe.seed + 1)
        self._teachers = build.build_teachers(self.plan, self.world, self.log)
        watchdog.beat("building the student")
        torch.manual_seed(recipe.seed)
        self._learners = build.build_learners(self.plan, self._teachers, device)
        module = self._learners.module
        self._evaluator = Evaluator(self.plan, self.world, self._learners, StopPoller(self.world, self._stop))
        if state is not None:
            checkpoint.check_fits(self._resumed_from, state.weights, trained_shapes(module))
            if self.plan.pairs is not None:
                self.plan.pairs.task.restore(state.objectives)
        self._engine = Engine(module.to(device), self._learners.groups, recipe.optim, self.plan.config, self.world, state)

    def _fit(self, progress: Progress) -> None:
        plan, world = self.plan, self.world
        preprocess = {role: preprocessing(model) for role, model in build.live_teachers(plan, self._teachers).items()}
        if self._learners.student is not None:
            preprocess["student"] = self._learners.student.preprocess
        answer = None if self.recipe.answers is None else Answer(self.recipe.answers.weight, world)
        task = StepLosses(plan.pairs.task if plan.pairs else None, answer)
        self._watch = lora.Watch(self._engine.module)
        trainer = Trainer(self.recipe, world, self._engine, task, self._teachers, preprocess, self.log, self._stop)
        with build.open_batches(plan, self._learners, self._teachers, progress, world) as batches:
            trainer.fit(batches, progress, self)

    def stepped(self) -> None:
        """Refuse adapters that no gradient reached on any rank: they would be trained in name alone."""
        module, reached = self._learners.module, self._watch.close()
        if reached:
            assert isinstance(module, VisionLanguageStudent)
            flags = torch.tensor([float(was) for was in reached.values()], device=self.world.device)
            sums = collectives.start_sum(flags, self.world).read()
            lora.refuse_unreached(dict(zip(reached, map(bool, sums), strict=True)), module.decoder.language)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; every rank learns whether it is there before it goes on."""
        watchdog.beat("saving a checkpoint", progress.step)
        exported = self._engine.export(moments=True, everywhere=False)
        pairs = self.plan.pairs
        state = exported if pairs is None else dataclasses.replace(exported, objectives=pairs.task.state())
        collectives.by_main(lambda: self._write_checkpoint(progress, state), self.world)

    def _write_checkpoint(self, progress: Progress, state: State) -> None:
        if self.log.failure is not None:
            raise self.log.failure  # a run that goes on from here would lack that row
        checkpoint.save(self.folder, progress, state, self.recipe.checkpoint.keep)

    def evaluate(self, step: int) -> None:
        """Score the current weights on the recipe's sets, into metrics.jsonl, evaluation.json and the JSON's monitors."""
        if self._evaluator:
            watchdog.beat("evaluating", step)
            results = self._evaluator.results(self._engine, step, self.folder)
            collectives.by_main(lambda: self._write_evaluation(results), self.world)
            self._engine.monitor(report.numbers(results), step * self.recipe.samples_in_a_step(), "Evaluation")

    def evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl has the scores of this step on these sets. A collective. evaluation.json is made of them if it is gone."""

        def is_in_metrics() -> bool:
            rows = [row for row in run_folder.read_metrics(self.folder) if row.get("event") == "evaluation" and row["step"] == step]
            scores = [
                row["content"]
                for row in rows
                if isinstance(row.get("content"), dict) and row["content"].get("sets") == sets_of(self.recipe)
            ]
            if scores and not (self.folder / run_folder.EVALUATION).exists():
                run_folder.write_json(self.folder / run_folder.EVALUATION, scores[-1])
            return bool(scores)

        return collectives.by_main(is_in_metrics, self.world)

    def _write_evaluation(self, results: dict[str, Any]) -> None:
        run_folder.write_json(self.folder / run_folder.EVALUATION, results)
        self.log.event(results["step"], "evaluation", results)
        self.log.say(report.lines(results))
