"""The one fit loop, for every task: batches -> teacher -> student and decoder -> losses -> update -> log, evaluate, checkpoint.

`Trainer.step` is one update, to be read from top to bottom. Randomness in a step (dropout, patch dropout) comes from generators seeded
by (seed, step, rank, micro-batch), so a resumed run draws what an undisturbed one draws.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megakd.data.bad_samples import BadCounter
from megakd.objectives.set import weighted_sum
from megakd.recipe import Recipe
from megakd.runtime import collectives, watchdog
from megakd.runtime.checkpoint import Progress
from megakd.runtime.engine import Engine
from megakd.runtime.exits import Interrupted, LossNotFinite
from megakd.runtime.gathered import Gathered
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopRequest
from megakd.runtime.run_folder import RunLog
from megakd.runtime.stopwatch import COMPILE, Stopwatch, memory_gb
from megakd.training import by_source
from megakd.training.accumulation import GradCache
from megakd.training.by_source import BySource, Means
from megakd.training.feed import Batches, Feed
from megakd.training.optim import learning_rate
from megakd.training.tasks.base import BadSamples, StepPart, Task


class Hooks(Protocol):
    """What the job does at step boundaries; every rank calls all."""

    def stepped(self) -> None:
        """After the first step of this start."""

    def profiled(self) -> None:
        """After each step and its row."""

    def save(self, progress: Progress) -> None: ...

    def evaluate(self, step: int) -> None:
        """Raises Interrupted when a signal comes meanwhile."""

    def evaluated(self, step: int) -> bool:
        """Whether an earlier start has."""


@dataclass(frozen=True)
class StepSummary:
    """What all ranks know of a step after one small all-reduce. values: means over the ranks of the losses and of what tasks log.

    by_source: on logged steps, of a mixture's sources. position: what the next step begins with in the first task's data.
    """

    values: dict[str, float]
    finite: bool
    stop: bool
    log_failed: bool
    bad: BadSamples
    by_source: Means
    position: int


class Trainer:
    """Holds what a step needs. `fit` runs to the recipe's last step, to a signal, or to an error."""

    def __init__(self, recipe: Recipe, world: World, engine: Engine, tasks: Sequence[Task], log: RunLog, stop: StopRequest) -> None:
        self.recipe, self.world, self.engine, self.tasks = recipe, world, engine, tasks
        self._names = [name for task in tasks for name in task.weights]
        self._logged = [name for task in tasks for name in task.logged]
        self._log, self._stop = log, stop
        self.clock = Stopwatch(world.device)
        self._bad = BadSamples({task.items: BadCounter() for task in tasks})
        self._sources = BySource(tasks, world.device)

    def fit(self, batches: Iterator[Batches], start: Progress, hooks: Hooks) -> None:
        """Train from `start` to the last step. Raises Interrupted when a signal stops it, after a save."""
        recipe, step = self.recipe, start.step
        self._feed = Feed(batches, self.tasks, self.world, self.clock, ahead=recipe.data.prefetch)
        self._row_of_ahead()  # what teachers gathered while they were loaded is of no step
        self._sources.started_at = step
        if self._to_evaluate(step) and not hooks.evaluated(step):  # a signal came first
            hooks.evaluate(step)
        since, images = time.perf_counter(), 0
        self.clock.restart()
        while step < recipe.optim.steps:
            summary = self.step(step)
            if step == start.step:
                hooks.stepped()
            step, images = step + 1, images + recipe.samples_in_a_step()
            if self._is_logged(step) or summary.stop:
                now = time.perf_counter()
                self._write_row(step, summary, images, now - since)
                since, images = now, 0  # what writing takes counts in the next row
            away = time.perf_counter()
            with self.clock.aside():
                hooks.profiled()
            since += time.perf_counter() - away
            progress = replace(start, step=step, position=summary.position)
            saved = summary.stop or self._to_save(step)
            if saved:
                self._save(progress, hooks)
            if summary.stop and step < recipe.optim.steps:
                raise Interrupted
            if self._to_evaluate(step):
                away = time.perf_counter()
                try:
                    with self.clock.aside():
                        hooks.evaluate(step)
                except (Interrupted, ValueError):  # of an evaluation set, on every rank: the steps behind it are kept
                    if not saved:
                        self._save(progress, hooks)
                    raise
                since += time.perf_counter() - away

    def _is_logged(self, step: int) -> bool:
        """Whether so many steps end with a row of the log, without a signal."""
        return step % self.recipe.log.every == 0 or step == self.recipe.optim.steps

    def _to_evaluate(self, step: int) -> bool:
        """During the run; the end is the job's."""
        every = self.recipe.evaluation.every
        return every > 0 and 0 < step < self.recipe.optim.steps and step % every == 0

    def _to_save(self, step: int) -> bool:
        """Without a signal."""
        # One goes on from the best evaluation's step at the earliest, so that RUN/best is never of steps that are still to come.
        best = self.recipe.checkpoint.best is not None and self._to_evaluate(step)
        return step == self.recipe.optim.steps or best or step % self.recipe.checkpoint.every == 0

    def _save(self, progress: Progress, hooks: Hooks) -> None:
        """A finite loss may have a gradient that is not, which shows in the loss one step later: too late for this checkpoint."""
        if not math.isfinite(self.engine.gradient_norm):
            raise LossNotFinite(f"step {progress.step}: the gradient norm is {self.engine.gradient_norm}; this step was not saved")
        hooks.save(progress)

    def step(self, step: int) -> StepSummary:
        """One update on one global batch. Raises on every rank, before any weight moves, LossNotFinite or what the log met with."""
        # Data and teachers (feed.py): what each task gives the module, its losses as a function of the outputs (`part` in tasks/distill.py)
        batches, taught = self._feed.take(step)
        parts = [task.part(batch, known, step) for task, batch, known in zip(self.tasks, batches, taught, strict=True)]
        last = self.engine.accumulation - 1

        # Losses that do not add up over micro-batches: those of the whole batch, and their gradient at the outputs, come before the
        # forwards that count, see accumulation.py. Batch norm would move its statistics twice for one step.
        cache: GradCache | None = None
        if last and not all(task.adds_up for task in self.tasks):
            with torch.no_grad(), self.engine.unmoved_buffers():
                cache = GradCache([self._forward(parts, step, number) for number in range(last + 1)])
            losses, total = self._losses(parts, cache.leaves, step)
            pending = self._announce([losses], cache.leaves, batches, self._by_source(parts, [cache.leaves], batches, step))
            with self.clock.part("loss"):
                cache.backward(total)

        # Forward, losses, backward
        added: list[dict[str, Tensor]] = []
        given: list[dict[str, Tensor]] = []
        for number in range(last + 1):
            outputs = self._forward(parts, step, number)
            if cache is not None:
                total = cache.surrogate(outputs, number)
            else:
                losses, total = self._losses(parts, outputs, step)
                added.append(losses)
                given.append(self._sources.outputs(outputs))
                if number == last:
                    pending = self._announce(added, outputs, batches, self._by_source(parts, given, batches, step))
            with self.clock.part("student"):
                self.engine.backward(total)
            if number < last:
                self.engine.accumulated()
        with self.clock.part("reduce"):
            self.engine.reduce()

        # The next step's data and teachers, beside what the device still has to do of this one
        if not (self._to_save(step + 1) or self._to_evaluate(step + 1)):
            self._feed.fetch(step + 1)

        # Agree
        watchdog.beat("agreeing", step)
        summary = self._agree(pending, batches)
        self._refuse(summary, step)

        # Update
        watchdog.beat("update", step)
        with self.clock.part("update"):
            self.engine.update(learning_rate(self.recipe.optim, step))
        self._check_data(summary.bad)
        return summary

    def _refuse(self, summary: StepSummary, step: int) -> None:
        if not summary.finite:
            raise LossNotFinite(
                f"step {step + 1}: the loss is not finite on at least one rank: {summary.values} (NaN and infinity shown as 0); "
                f"no weight has moved in this step"
            )
        if summary.log_failed:
            failure = collectives.share(self._log.failure, self.world)
            assert isinstance(failure, OSError)
            raise failure

    def _forward(self, parts: list[StepPart], step: int, micro_batch: int) -> dict[str, Tensor]:
        # Seeded by place, not by history: a resumed run and the second forward of a micro-batch drop out what the first did.
        watchdog.beat("student", step)
        place = f"{self.recipe.seed}/{step}/{self.world.rank}/{micro_batch}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest(), "big"))
        inputs = {name: value for part in parts for name, value in part.inputs[micro_batch].items()}
        with self.clock.part("student"):
            return self.engine.forward(**inputs)

    def _weights(self, step: int) -> dict[str, float]:
        return {name: weight for task in self.tasks for name, weight in task.weights_at(step).items()}

    def _losses(self, parts: list[StepPart], outputs: dict[str, Tensor], step: int) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by name, and their weighted sum."""
        with self.clock.part("loss"):
            losses = {name: loss for part in parts for name, loss in part.losses(outputs).items()}
            return losses, weighted_sum(losses, self._weights(step))

    def _by_source(self, parts: list[StepPart], outputs: list[dict[str, Tensor]], batches: Batches, step: int) -> Tensor:
        """This rank's part of what is logged of a mixture's sources; empty on a step that is not logged."""
        if not self._is_logged(step + 1):
            return torch.zeros(0, device=self.world.device)
        with self.clock.part("loss"):
            return self._sources.sums(parts, outputs, batches)

    def _announce(
        self, added: list[dict[str, Tensor]], outputs: dict[str, Tensor], batches: Batches, of_sources: Tensor
    ) -> collectives.Pending:
        """Start telling the other ranks how this step stands; the backward runs meanwhile. added: losses that add up to the step's."""
        values = [torch.stack([losses[name].detach() for losses in added]).sum().float() for name in self._names]
        found = {**outputs, **{name: value for task in self.tasks for name, value in task.values().items()}}
        values_V = torch.stack([*values, *(found[name].detach().float() for name in self._logged)])
        wrong = (~values_V.isfinite()).any().float().reshape(1)
        flags = [float(bool(self._stop)), float(bool(self._log.failure))]
        counts = torch.tensor([*flags, *map(float, self._bad_in(batches).to_list())], device=values_V.device)
        return collectives.start_sum(torch.cat([wrong, values_V.nan_to_num() / self.world.size, counts, of_sources]), self.world)

    def _agree(self, pending: collectives.Pending, batches: Batches) -> StepSummary:
        wrong, *values = pending.read()
        names = [*self._names, *self._logged]
        means, (stop, log_failed, *rest) = values[: len(names)], values[len(names) :]
        here = self._bad_in(batches)
        end = len(here.to_list())
        bad, of_sources = BadSamples.from_list([int(count) for count in rest[:end]], here), self._sources.means(rest[end:])
        shown = dict(zip(names, means, strict=True))
        return StepSummary(shown, wrong == 0, stop > 0, log_failed > 0, bad, of_sources, batches[0].next_position)

    def _bad_in(self, batches: Batches) -> BadSamples:
        return BadSamples({task.items: batch.bad for task, batch in zip(self.tasks, batches, strict=True)})

    def _check_data(self, bad: BadSamples) -> None:
        """The same numbers on every rank, so every rank stops or none."""
        self._bad.merge(bad)
        self._bad.check(self.recipe.data.max_bad_fraction, {task.items: task.in_a_step for task in self.tasks})

    def _row_of_ahead(self) -> dict[str, Any]:
        """What was asked for ahead of its use: batches by the feed, weights by partitioned teachers."""
        gathered = [found for task in self.tasks if (found := task.gathered()) is not None]
        counts = self._feed.counts() | (vars(Gathered.of(gathered)) if gathered else {})
        return {"ahead": counts} if counts else {}

    def _write_row(self, step: int, summary: StepSummary, images: int, elapsed: float) -> None:
        logged = {name: summary.values[name] for name in self._logged}
        losses = {name: summary.values[name] for name in self._names}
        total = sum(weight * losses[name] for name, weight in self._weights(step - 1).items())
        scheduled = {f"scheduled.{key}": self.recipe.value_at(key, step - 1) for key in self.recipe.schedules}
        lr, peak = learning_rate(self.recipe.optim, step - 1), self.recipe.optim.lr
        rates = {f"rates.{part}": lr / peak * rate for part, rate in self.recipe.optim.rates.items()}
        seconds = self.clock.read()
        images_per_second = images / (elapsed - seconds.get(COMPILE, 0.0))
        row: dict[str, Any] = {
            "step": step,
            "loss": total,
            "losses": losses,
            "backends": {name: backend for task in self.tasks for name, backend in task.backends.items()},
            "lr": lr,
            **_grouped({**logged, **scheduled, **rates}),
            "gradient_norm": self.engine.gradient_norm,
            "images_per_second": images_per_second,
            "memory_gb": memory_gb(self.world.device),
            "seconds": {**seconds, "other": elapsed - sum(seconds.values())},
            "processor_seconds": self.clock.read_processor(),
            "bad_samples": self._bad.counts,
            **self._row_of_ahead(),
            **self._sources.row(self._bad, summary.by_source),
        }
        self._log.row(row, self.recipe.optim.steps)
        flat = {"loss": total, **losses, "lr": lr, "images_per_second": images_per_second, **logged, **scheduled, **rates}
        flat |= by_source.flat(summary.by_source)
        self.engine.monitor(flat, step * self.recipe.samples_in_a_step())


def _grouped(values: dict[str, float]) -> dict[str, Any]:
    """GROUP.NAME as an entry of a table GROUP."""
    grouped: dict[str, Any] = {}
    for key, value in values.items():
        group, _, name = key.partition(".")
        if name:
            grouped.setdefault(group, {})[name] = value
        else:
            grouped[group] = value
    return grouped
