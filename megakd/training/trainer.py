"""The one fit loop, for every task: batches -> teacher -> student and decoder -> losses -> update -> log, evaluate, checkpoint.

`Trainer.step` is one update, to be read from top to bottom. Randomness in a step (dropout, patch dropout) comes from generators seeded
by (seed, step, rank, micro-batch), so a resumed run draws what an undisturbed one draws.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor

from megakd.data.pairs import Batch
from megakd.data.transforms import normalise
from megakd.models.embeddings import Embeddings
from megakd.models.vlm.student import QuestionInputs
from megakd.objectives.set import StepLosses
from megakd.recipe import Recipe
from megakd.runtime import collectives, watchdog
from megakd.runtime.checkpoint import Progress
from megakd.runtime.engine import Engine
from megakd.runtime.exits import Interrupted, LossNotFinite
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopRequest
from megakd.runtime.run_folder import RunLog
from megakd.runtime.stopwatch import Stopwatch, memory_gb
from megakd.teachers.base import Teacher
from megakd.teachers.cached import StoredTeacher, TextStoredTeacher
from megakd.training.accumulation import GradCache
from megakd.training.batch import BadSamples, JointBatch
from megakd.training.optim import learning_rate

AnyTeacher = Teacher | StoredTeacher | TextStoredTeacher
# One micro-batch, as the engine's module takes it: pixels and tokens of pairs, then the fields of `QuestionInputs`, where there are any.
Inputs = tuple[Tensor | None, ...]
_NO_SCALE = torch.zeros(())  # where nothing but answers is learned


class Hooks(Protocol):
    """What the job does at step boundaries; every rank calls all."""

    def stepped(self) -> None:
        """After the first step of this start."""

    def save(self, progress: Progress) -> None: ...

    def evaluate(self, step: int) -> None:
        """Raises Interrupted when a signal comes meanwhile."""

    def evaluated(self, step: int) -> bool:
        """Whether an earlier start has."""
        ...


@dataclass(frozen=True)
class StepSummary:
    """What all ranks know of a step after one small all-reduce."""

    losses: dict[str, float]
    finite: bool
    stop: bool
    log_failed: bool
    bad: BadSamples


class Trainer:
    """Holds what a step needs. `fit` runs to the recipe's last step, to a signal, or to an error."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        engine: Engine,
        task: StepLosses,
        teachers: Mapping[str, AnyTeacher],
        preprocess: dict[str, PreprocessCfg],
        log: RunLog,
        stop: StopRequest,
    ) -> None:
        """teachers: by role, as the recipe's `teachers()`; preprocess: of the student and of each live teacher, by the same names."""
        self.recipe, self.world, self.engine, self.task, self.teachers = recipe, world, engine, task, teachers
        self._preprocess, self._log, self._stop = preprocess, log, stop
        self.clock = Stopwatch(world.device)
        self._bad = BadSamples()

    def fit(self, batches: Iterator[JointBatch], start: Progress, hooks: Hooks) -> None:
        """Train from `start` to the last step. Raises Interrupted when a signal stops it, after a save."""
        recipe, step = self.recipe, start.step
        if self._to_evaluate(step) and not hooks.evaluated(step):  # a signal came first
            hooks.evaluate(step)
        since, images = time.perf_counter(), 0
        while step < recipe.optim.steps:
            watchdog.beat("waiting for data", step)
            with self.clock.host("data"):
                batch = next(batches)
            summary = self.step(batch, step)
            if step == start.step:
                hooks.stepped()
            step, images = step + 1, images + recipe.samples_in_a_step()
            last = step == recipe.optim.steps
            if step % recipe.log.every == 0 or last or summary.stop:
                now = time.perf_counter()
                self._write_row(step, summary, images / (now - since), now - since)
                since, images = now, 0  # what writing takes counts in the next row
            progress = replace(start, step=step, position=batch.next_position)
            saved = summary.stop or last or step % recipe.checkpoint.every == 0
            if saved:
                self._save(progress, hooks)
            if summary.stop and not last:
                raise Interrupted
            if self._to_evaluate(step):
                try:
                    hooks.evaluate(step)
                except (Interrupted, ValueError):  # of an evaluation set, on every rank: the steps behind it are kept
                    if not saved:
                        self._save(progress, hooks)
                    raise
                since, images = time.perf_counter(), 0

    def _to_evaluate(self, step: int) -> bool:
        """During the run; the end is the job's."""
        every = self.recipe.evaluation.every
        return every > 0 and 0 < step < self.recipe.optim.steps and step % every == 0

    def _save(self, progress: Progress, hooks: Hooks) -> None:
        self._check_gradient(progress.step)
        hooks.save(progress)

    def _check_gradient(self, step: int) -> None:
        """A finite loss may have a gradient that is not, which shows in the loss one step later: too late for this checkpoint."""
        if not math.isfinite(self.engine.gradient_norm):
            raise LossNotFinite(f"step {step}: the gradient norm is {self.engine.gradient_norm}; this step was not saved")

    def step(self, batch: JointBatch, step: int) -> StepSummary:
        """One update on one global batch. Raises on every rank, before any weight moves, LossNotFinite or what the log met with."""
        # Data and teacher
        watchdog.beat("teacher", step)
        batch = batch.to(self.world.device, non_blocking=True)
        with self.clock.part("teacher"):
            teacher_embeddings = [self._teach(batch.pairs, *named) for named in self.teachers.items() if batch.pairs is not None]
        micro_batches, answer_tokens = self._inputs(batch), self._answer_tokens(batch)
        last = len(micro_batches) - 1

        # Pairs in several micro-batches: the losses of the whole batch, and their gradient at the outputs, come before the forwards
        # that count, see accumulation.py. Batch norm would move its statistics twice for one step.
        cache: GradCache | None = None
        if last and batch.pairs is not None:
            with torch.no_grad(), self.engine.unmoved_buffers():
                cache = GradCache([self._forward(inputs, step, number) for number, inputs in enumerate(micro_batches)])
            losses, total = self._losses(cache.leaves, teacher_embeddings, answer_tokens, step)
            pending = self._announce([losses], cache.leaves["scale"], batch)
            cache.backward(total)

        # Forward, losses, backward
        parts: list[dict[str, Tensor]] = []
        for number, inputs in enumerate(micro_batches):
            outputs = self._forward(inputs, step, number)
            if cache is not None:
                total = cache.surrogate(outputs, number)
            else:  # losses of answers are sums over questions, which add up
                losses, total = self._losses(outputs, teacher_embeddings, answer_tokens, step)
                parts.append(losses)
                if number == last:
                    pending = self._announce(parts, outputs.get("scale", _NO_SCALE), batch)
            with self.clock.part("student"):
                self.engine.backward(total)
            if number < last:
                self.engine.accumulated()

        # Agree
        summary = self._agree(pending, batch)
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
                f"step {step + 1}: the loss is not finite on at least one rank: {summary.losses} (NaN and infinity shown as 0); "
                f"no weight has moved in this step"
            )
        if summary.log_failed:
            failure = collectives.share(self._log.failure, self.world)
            assert isinstance(failure, OSError)
            raise failure

    def _inputs(self, batch: JointBatch) -> list[Inputs]:
        """The batch in micro-batches, one for each accumulation step."""
        count = self.engine.accumulation
        pairs: list[Inputs] = [(None, None)] * count
        if batch.pairs is not None:
            pixels, tokens = self._view(batch.pairs, "student", self.engine.dtype)
            pairs = list(zip(pixels.tensor_split(count), tokens.tensor_split(count), strict=True))
        if batch.questions is None:
            return pairs
        told = batch.questions
        pixels_B = None if told.pixels is None else normalise(told.pixels, self._preprocess["student"], self.engine.dtype)
        questions = QuestionInputs(pixels_B, told.ids_BL, told.attend_BL, told.image_mask_BL, told.labels_BL).split(count)
        return [(*pair, *question) for pair, question in zip(pairs, questions, strict=True)]

    def _answer_tokens(self, batch: JointBatch) -> float:
        """Tokens of the global batch that are learned; a collective where there are questions."""
        if self.task.answer is None or batch.questions is None:
            return 1.0
        return self.task.answer.answer_tokens(batch.questions.labels_BL)

    def _forward(self, inputs: Inputs, step: int, micro_batch: int) -> dict[str, Tensor]:
        # Seeded by place, not by history: a resumed run and the second forward of a micro-batch drop out what the first did.
        watchdog.beat("student", step)
        place = f"{self.recipe.seed}/{step}/{self.world.rank}/{micro_batch}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest(), "big"))
        with self.clock.part("student"):
            return self.engine.forward(*inputs)

    def _losses(
        self, outputs: dict[str, Tensor], teacher_embeddings: list[Embeddings], answer_tokens: float, step: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by name, and their weighted sum."""
        with self.clock.part("loss"):
            losses = self.task.losses(outputs, teacher_embeddings, answer_tokens, step)
            return losses, self.task.total(losses)

    def _teach(self, batch: Batch, role: str, teacher: AnyTeacher) -> Embeddings:
        size = self.engine.micro_batch
        if isinstance(teacher, StoredTeacher):
            assert batch.stored is not None, "the loader was given the store"
            assert batch.view is not None
            stored = batch.stored
            return teacher.recall(stored.image, stored.text, stored.known, batch.index, batch.view, stored.damaged)
        pixels, tokens = self._view(batch, role, teacher.dtype)
        if isinstance(teacher, TextStoredTeacher):
            assert batch.stored is not None, "the loader was given the store"
            image_BD = torch.cat([teacher.embed_images(micro_batch) for micro_batch in pixels.split(size)])
            return teacher.join(image_BD, batch.stored.text, batch.stored.known, batch.index, batch.stored.damaged)
        parts = [teacher.embed(*micro_batch) for micro_batch in zip(pixels.split(size), tokens.split(size), strict=True)]
        return parts[0]._replace(image=torch.cat([part.image for part in parts]), text=torch.cat([part.text for part in parts]))

    def _view(self, batch: Batch, tower: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return normalise(batch.pixels[tower], self._preprocess[tower], dtype), batch.tokens[tower]

    def _announce(self, parts: list[dict[str, Tensor]], scale: Tensor, batch: JointBatch) -> collectives.Pending:
        """Start telling the other ranks how this step stands; the backward runs meanwhile. parts: losses that add up to the step's."""
        values = torch.stack([torch.stack([part[name].detach() for part in parts]).sum().float() for name in parts[0]])
        values = torch.cat([values, scale.detach().float().reshape(1).to(values.device)])
        wrong = (~values.isfinite()).any().float().reshape(1)
        flags = [float(bool(self._stop)), float(self._log.failure is not None)]
        counts = torch.tensor([*flags, *map(float, batch.bad.to_list())], device=values.device)
        return collectives.start_sum(torch.cat([wrong, values.nan_to_num() / self.world.size, counts]), self.world)

    def _agree(self, pending: collectives.Pending, batch: JointBatch) -> StepSummary:
        wrong, *values = pending.read()
        names = [*self.task.weights, "scale"]
        means, (stop, log_failed, *counts) = values[: len(names)], values[len(names) :]
        bad = BadSamples.from_list([int(count) for count in counts], batch.bad)
        return StepSummary(dict(zip(names, means, strict=True)), wrong == 0, stop > 0, log_failed > 0, bad)

    def _check_data(self, bad: BadSamples) -> None:
        """The same numbers on every rank, so every rank stops or none."""
        self._bad.merge(bad)
        self._bad.check(self.recipe.data.max_bad_fraction, self.recipe.optim.batch, self.recipe.questions_in_a_step())

    def _write_row(self, step: int, summary: StepSummary, images_per_second: float, elapsed: float) -> None:
        losses = dict(summary.losses)
        scale = losses.pop("scale")
        total = sum(self.task.weights[name] * loss for name, loss in losses.items())
        seconds = self.clock.read()
        row: dict[str, Any] = {
            "step": step,
            "loss": total,
            "losses": losses,
            "backends": self.task.backends,
            "lr": learning_rate(self.recipe.optim, step - 1),
            **({"scale": scale} if self.task.distill is not None else {}),
            "gradient_norm": self.engine.gradient_norm,
            "images_per_second": images_per_second,
            "memory_gb": memory_gb(self.world.device),
            "seconds": {**seconds, "other": elapsed - sum(seconds.values())},
            "bad_samples": self._bad.counts,
        }
        self._log.row(row, self.recipe.optim.steps)
        flat = {"loss": total, **losses, "lr": row["lr"], "images_per_second": images_per_second}
        flat |= {"scale": scale} if self.task.distill is not None else {}
        self.engine.monitor(flat, step * self.recipe.samples_in_a_step())
