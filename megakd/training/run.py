"""One run from a plan to a finished folder: resume, build, fit, evaluate, export. What can be checked before is in `prepare.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megakd.evaluation import report
from megakd.evaluation.sets import sets_of
from megakd.recipe.best import BOTH, CURRENT, EMA
from megakd.runtime import (
    checkpoint,
    collectives,
    compiler,
    engine,
    environment,
    failures,
    files,
    launch,
    monitors,
    peers,
    precision,
    run_folder,
    shared_folder,
    watchdog,
)
from megakd.runtime.checkpoint import Progress
from megakd.runtime.engine import Engine, State
from megakd.runtime.exits import EXIT_SAVED, Interrupted, LossNotFinite
from megakd.runtime.launch import World
from megakd.runtime.locks import LOCK, FolderLock
from megakd.runtime.module_state import held_shapes
from megakd.runtime.preemption import StopPoller, StopRequest
from megakd.runtime.profiler import BEFORE, recording
from megakd.runtime.run_folder import RunLog
from megakd.runtime.watchdog import HUNG, HangWatchdog
from megakd.training import best, feed
from megakd.training.build import build_learners
from megakd.training.prepare import PreparedRun, with_start
from megakd.training.trainer import Trainer
from megakd.vqa.evaluate import ANSWERS

# Seconds in which the ranks of a job that was just killed are gone, so that the same command may follow at once.
LOCK_SECONDS = 20.0


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
            try:
                code = self._execute()
            except BaseException as error:
                self.log.ended(run_folder.FAILED, _last_words(error))
                raise
            self.log.ended(run_folder.SAVED if code else run_folder.FINISHED)
            if self._is_built:
                self._release()
            return code

    def _release(self) -> None:
        """Make room for the run that may follow in this process. After an error none does, and this could wait for a device that hangs."""
        self._engine.close()
        engine.forget()
        compiler.forget()
        del self._engine, self._tasks, self._module
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _lock(self, held: contextlib.ExitStack) -> None:
        remedy = "end it first, or choose another --out"
        held.enter_context(FolderLock(self.folder, doing="is at work on this run now", remedy=remedy, timeout=LOCK_SECONDS))
        if left := files.clear(self.folder, checkpoint.folder_of(self.folder), self.folder / ANSWERS):
            names = ", ".join(path.name for path in left[:4]) + f" and {len(left) - 4} more" * (len(left) > 4)
            self.log.say(f"{self.folder}: cleared what an earlier start had half written or half removed: {names}")
        # Stacks of an earlier start: the rank without a file would be looked for among all that were ever written.
        run_folder.archive(self.folder, list(self.folder.glob(HUNG)))

    def _execute(self) -> int:
        job = environment.job_id(os.environ)
        slurm = "" if job is None else f", SLURM job {job}, restart {environment.restarts(os.environ)}"
        self.log.say(f"{self.recipe.name}: run folder {self.folder}{slurm}")
        changed: list[str] = []
        if self.plan.request.resume != "none":
            changed = collectives.by_main(lambda: run_folder.changes(self.folder, self.recipe), self.world)
        progress, state = self._starting_point()
        if state is not None:
            for line in changed:
                self.log.say(line)
        self._go_on_in_monitors(progress)
        collectives.by_main(lambda: self.log.open(self.recipe, self.plan.config, self.world.size, progress.step), self.world)
        if self._has_finished(progress):
            self.log.say(f"this run has ended before: its scores are in {self.folder / run_folder.EVALUATION}")
            self.log.say(f"done: {self.folder}")
            return 0
        self.log.say(self._outline())
        self._build(state)
        self._is_built = True
        del state
        launch.wait_longer_than(self.recipe.watchdog.limit)
        try:
            try:
                if progress.step < self.recipe.optim.steps:
                    self._fit(progress)
            finally:
                self.log.close()
            self._finish()
        except Interrupted:
            self.log.say(f"stopped by a signal after saving; the same command goes on from there (exit code {EXIT_SAVED})")
            return EXIT_SAVED
        return 0

    def _go_on_in_monitors(self, progress: Progress) -> None:
        samples = progress.step * self.recipe.samples_in_a_step()
        begun = collectives.by_main((self.folder / run_folder.METRICS).exists, self.world)
        evaluated = begun and self.evaluated(progress.step)
        for line in collectives.by_main(lambda: monitors.go_on(self.plan.config, self.folder, samples, evaluated=evaluated), self.world):
            self.log.say(line)

    def _outline(self) -> str:
        """What is about to start, before the wait for models and DeepSpeed."""
        config, recipe = self.plan.config, self.recipe
        how = f"{self.world.size} x {self.world.device.type}, ZeRO {config.stage}, {config.precision}"
        if (forced := precision.asked()) is not None:
            how += f" ({precision.VARIABLE}={forced})"
        if config.accumulates_in_bf16:
            how += " (gradients add up in bf16, as data_types.grad_accum_dtype says: fp32 loses nothing)"
        if recipe.active():
            how += f", batch {recipe.optim.batch} = {self.world.size} ranks x {config.micro_batches} x {config.micro_batch}"
        lines = [f"scheduled: {line}" for line in recipe.scheduled()] + [line for task in self.plan.tasks for line in task.describe()]
        lines += [*self.plan.learning, *feed.outline(recipe, self.world)]
        return "\n".join([f"{recipe.optim.steps} steps, {how}", *lines])

    def _finish(self) -> None:
        """What was trained is written before it is scored: an evaluation may take hours, and fail."""
        steps = self.recipe.optim.steps
        averaged = self.recipe.export.weights == EMA
        state = self._engine.export(moments=False, everywhere=False, averages=averaged)
        collectives.by_main(lambda: self._write_results(state, averaged), self.world)
        try:
            if not self.evaluated(steps):
                self.evaluate(steps)
        except ValueError as error:
            written = " and ".join(str(self.folder / task.result) for task in self.plan.tasks)
            raise ValueError(
                f"{error}\nTraining is done and kept in {written}; once this is put right, the same command evaluates it"
            ) from error
        self.log.say(f"done: {self.folder}")

    def _has_finished(self, progress: Progress) -> bool:
        """Whether an earlier start has come to the end: everything is written and scored on these sets. A collective."""
        if progress.step < self.recipe.optim.steps or not self.plan.is_scored:
            return False
        results = [self.folder / task.result for task in self.plan.tasks]
        return self.evaluated(progress.step) and collectives.by_main(lambda: all(one.is_dir() for one in results), self.world)

    def _write_results(self, state: State, averaged: bool) -> None:
        if self.log.failure is not None:
            raise self.log.failure
        self._write_into(self.folder, state, averaged)

    def _write_into(self, folder: Path, state: State, averaged: bool) -> None:
        with self._engine.holding(state.averaged if averaged else {}):
            for task in self._tasks:
                task.write(state.averaged if averaged else state.weights, folder)

    def _starting_point(self) -> tuple[Progress, State | None]:
        """Where to go on. Rank 0 looks and clears the way, then all ranks read the same checkpoint."""
        path, data = collectives.by_main(self._choose_checkpoint, self.world), self.plan.signature()
        if path is None:
            self._set_best_aside(0)
            collectives.by_main(lambda: self.log.keep_until(0), self.world)
            return Progress(0, 0, self.recipe.seed, data), None
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
        if progress.data == self.plan.signature(of_names=True) != data:
            self.log.say(f"{path} knows its shards by name and length alone: whether their content is still the same was not looked at")
            progress = dataclasses.replace(progress, data=data)
        if progress.data != data:
            raise ValueError(
                f"{' and '.join(task.key for task in self.plan.tasks)}: the data have changed since {path} was written, so its position "
                f"in them means nothing; put the same shards and questions back, or start over with --resume none or another --out"
            )
        self.log.say(f"resuming from {path}: step {progress.step} of {self.recipe.optim.steps}")
        self._set_best_aside(progress.step)
        collectives.by_main(lambda: self.log.keep_until(progress.step), self.world)
        return progress, state

    def _set_best_aside(self, step: int) -> None:
        if line := collectives.by_main(lambda: best.set_aside(self.folder, step), self.world):
            self.log.say(line)

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

    def _build(self, state: State | None) -> None:
        recipe, world, have = self.recipe, self.world, () if state is None else state.weights.keys()
        # Before the teachers are loaded, which takes longer than to find that weights are missing.
        self.plan = plan = with_start(self.plan, have, world)
        if plan.start is not None and world.is_main:
            self.log.begins_with(plan.start.record(), plan.start.describe())
        self._tasks = [task.start(plan.config, world, self.log) for task in plan.tasks]
        watchdog.beat("building the student")
        torch.manual_seed(recipe.seed)
        self._module, groups = build_learners(plan, self._tasks, world, self.log.say, have)
        if state is not None:
            checkpoint.check_fits(self._resumed_from, state.weights, held_shapes(self._module, self._module.frozen))
            if recipe.optim.ema is not None and not state.averages:
                raise ValueError(f"optim.ema: {self._resumed_from} holds no averages; take it out, or start over with --resume none")
            for task in self._tasks:
                task.restore(state.objectives)
        self._engine = Engine(self._module.to(world.device), groups, recipe.optim, plan.config, world, state, self._module.frozen)

    def _fit(self, progress: Progress) -> None:
        trainer = Trainer(self.recipe, self.world, self._engine, self._tasks, self.log, self._stop)
        with contextlib.ExitStack() as opened:
            batches = [opened.enter_context(task.open(progress)) for task in self._tasks]
            steps = self.recipe.log.profile if self.world.is_main else 0
            if steps and (left := self.recipe.optim.steps - progress.step) <= BEFORE:
                self.log.say(f"log.profile = {steps}: this start has {left} steps left, and the first {BEFORE} are not recorded: none is")
            self._record = opened.enter_context(recording(steps, self.folder / run_folder.PROFILE, self.world.device))
            trainer.fit(zip(*batches, strict=True), progress, self)

    def stepped(self) -> None:
        if (record := compiler.record()) is not None and self.world.is_main:
            self.log.has_compiled(record)
        for task in self._tasks:
            task.stepped()

    def profiled(self) -> None:
        self._record()

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; every rank learns whether it is there before it goes on."""
        watchdog.beat("saving a checkpoint", progress.step)
        exported = self._engine.export(moments=True, everywhere=False, averages=True)
        kept = {name: value for task in self._tasks for name, value in task.state().items()}
        state = dataclasses.replace(exported, objectives=kept)
        collectives.by_main(lambda: self._write_checkpoint(progress, state), self.world)

    def _write_checkpoint(self, progress: Progress, state: State) -> None:
        if self.log.failure is not None:
            raise self.log.failure  # a run that goes on from here would lack that row
        checkpoint.save(self.folder, progress, state, self.recipe.checkpoint.keep)

    def evaluate(self, step: int) -> None:
        """Score what evaluation.weights says on the recipe's sets, into metrics.jsonl, evaluation.json and the JSON's monitors."""
        if self.plan.is_scored:
            watchdog.beat("evaluating", step)
            which, score = self.recipe.evaluation.weights, self.recipe.best_score()
            state = self._engine.export(moments=False, everywhere=True, averages=which != CURRENT)
            results: dict[str, Any] = {"step": step, "sets": sets_of(self.recipe), **({} if which == CURRENT else {"weights": which})}
            results |= self._scores(state, which == EMA, step)
            if which == BOTH:
                results[EMA] = self._scores(state, True, step)
            if score is not None:
                write = partial(self._write_into, state=state, averaged=score.averaged)
                kept = collectives.by_main(lambda: best.keep(self.folder, score, results, write), self.world)
            collectives.by_main(lambda: self._write_evaluation(results), self.world)
            if score is not None and kept is not None:
                self.log.say(kept)
            self._engine.monitor(report.numbers(results), step * self.recipe.samples_in_a_step(), "Evaluation")

    def _scores(self, state: State, averaged: bool, step: int) -> dict[str, Any]:
        interruptions, found = StopPoller(self.world, self._stop), dict[str, Any]()
        with self._engine.holding(state.averaged if averaged else {}):
            for task in self._tasks:
                found |= task.evaluate(state.averaged if averaged else state.weights, step, self.folder, interruptions)
        return found

    def evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl has the scores of this step on these sets. A collective. evaluation.json is made of them if it is gone."""

        def is_in_metrics() -> bool:
            rows = [row for row in run_folder.read_metrics(self.folder) if row.get("event") == "evaluation" and row["step"] == step]
            compared = self.recipe.evaluation.diagnostics.keys()
            scores = [
                content
                for row in rows
                if isinstance(content := row.get("content"), dict)
                and content.get("sets") == sets_of(self.recipe)
                and content.get("weights", CURRENT) == self.recipe.evaluation.weights
                and compared <= content.get("diagnostics", {}).keys()
            ]
            if scores and not (self.folder / run_folder.EVALUATION).exists():
                run_folder.write_json(self.folder / run_folder.EVALUATION, scores[-1])
            return bool(scores)

        return collectives.by_main(is_in_metrics, self.world)

    def _write_evaluation(self, results: dict[str, Any]) -> None:
        run_folder.write_json(self.folder / run_folder.EVALUATION, results)
        self.log.event(results["step"], "evaluation", results)
        self.log.say(report.lines(results))


def _last_words(error: BaseException) -> str:
    """Why a run ended, as its console says it; of a lost connection, what the other rank said."""
    lost = failures.is_lost_peer(error)
    if not failures.is_ours(error) and (other := launch.heard(1.0 if lost else 0.0)) is not None:
        return peers.of_another(other)
    if isinstance(error, LossNotFinite):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was trained since the last checkpoint is lost"
    return failures.explain(error) or f"{type(error).__name__}: {error}"
