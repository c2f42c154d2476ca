"""The one fit loop, for every task: batches -> teacher -> student and decoder -> losses -> update -> log, evaluate, checkpoint.

Randomness in a step (dropout, patch dropout) comes from generators seeded by (seed, step, rank), so a resumed run draws what an
undisturbed one draws. Accumulation is exact: a contrastive loss over micro-batches is another loss than over their union, so the
gradient at the embeddings is taken over the whole batch and carried back micro-batch by micro-batch (GradCache, arXiv 2101.06983).
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
from megakd.objectives.joint import Joint
from megakd.recipe import Optim, Recipe
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
from megakd.training.batch import BadSamples, JointBatch

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


def learning_rate(optim: Optim, step: int) -> float:
    """Learning rate of the update number `step` (from 0): linear warm-up, then cosine to final_lr * lr, or constant."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


class Trainer:
    """Holds what a step needs. `fit` runs to the recipe's last step, to a signal, or to an error."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        engine: Engine,
        task: Joint,
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
            agreed = self.step(batch, step)
            if step == start.step:
                hooks.stepped()
            step, images = step + 1, images + recipe.samples_in_a_step()
            last = step == recipe.optim.steps
            if step % recipe.log.every == 0 or last or agreed.stop:
                now = time.perf_counter()
                self._write_row(step, agreed, images / (now - since), now - since)
                since, images = now, 0  # what writing takes counts in the next row
            progress = replace(start, step=step, position=batch.next_position)
            saved = agreed.stop or last or step % recipe.checkpoint.every == 0
            if saved:
                self._save(progress, hooks)
            if agreed.stop and not last:
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
        self._refuse_to_save_ruins(progress.step)
        hooks.save(progress)

    def _refuse_to_save_ruins(self, step: int) -> None:
        """A finite loss may have a gradient that is not, which shows in the loss one step later: too late for this checkpoint."""
        if not math.isfinite(self.engine.gradient_norm):
            raise LossNotFinite(f"step {step}: the gradient norm is {self.engine.gradient_norm}; this step was not saved")

    def step(self, batch: JointBatch, step: int) -> StepSummary:
        """One update on one global batch. Raises on every rank, before any weight moves, LossNotFinite or what the log met with."""
        watchdog.beat("teacher", step)
        batch = batch.to(self.world.device, non_blocking=True)
        with self.clock.part("teacher"):
            taught = [self._teach(batch.pairs, role, teacher) for role, teacher in self.teachers.items() if batch.pairs is not None]
        agreed = self._agree(self._gradients(batch, taught, step), batch)
        if not agreed.finite:
            raise LossNotFinite(
                f"step {step + 1}: the loss is not finite on at least one rank: {agreed.losses} (NaN and infinity shown as 0); "
                f"no weight has moved in this step"
            )
        if agreed.log_failed:
            failure = collectives.share(self._log.failure, self.world)
            assert isinstance(failure, OSError)
            raise failure
        watchdog.beat("update", step)
        with self.clock.part("update"):
            self.engine.update(learning_rate(self.recipe.optim, step))
        self._judge_data(agreed.bad)
        return agreed

    def _gradients(self, batch: JointBatch, taught: list[Embeddings], step: int) -> collectives.Pending:
        pieces = self._inputs(batch)
        learned = 1.0
        if self.task.answer is not None and batch.questions is not None:
            learned = self.task.answer.answer_tokens(batch.questions.labels_BL)
        if len(pieces) > 1 and batch.pairs is not None:
            return self._exact_accumulation(pieces, batch, taught, learned, step)
        return self._summed(pieces, batch, taught, learned, step)

    def _summed(self, pieces: list[Inputs], batch: JointBatch, taught: list[Embeddings], learned: float, step: int) -> collectives.Pending:
        """One forward and backward for each piece. Answers' losses are sums over questions, which add up; those of pairs have one piece."""
        parts: list[dict[str, Tensor]] = []
        for number, piece in enumerate(pieces):
            outputs = self._forward(piece, step, number)
            losses, total = self._losses(outputs, taught, learned, step)
            parts.append({**{name: loss.detach() for name, loss in losses.items()}, "scale": outputs.get("scale", _NO_SCALE)})
            if number + 1 == len(pieces):
                summed = {name: torch.stack([part[name] for part in parts]).sum() for name in losses}
                pending = self._announce(summed, parts[0]["scale"], batch)
            with self.clock.part("student"):
                self.engine.backward(total)
            if number + 1 < len(pieces):
                self.engine.accumulated()
        return pending

    def _exact_accumulation(
        self, pieces: list[Inputs], batch: JointBatch, taught: list[Embeddings], learned: float, step: int
    ) -> collectives.Pending:
        # A piece's second forward is the one that counts: batch norm would move its statistics twice for one step.
        with torch.no_grad(), self.engine.unmoved_buffers():
            found = [self._forward(piece, step, number) for number, piece in enumerate(pieces)]
        leaves = {name: value.detach().requires_grad_() for name, value in _joined(found).items()}
        losses, total = self._losses(leaves, taught, learned, step)
        pending = self._announce(losses, leaves["scale"], batch)
        total.backward()  # type: ignore[no-untyped-call]
        gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
        shares = {name: _shares(gradient, [output[name] for output in found]) for name, gradient in gradients.items()}
        for number, piece in enumerate(pieces):
            outputs = self._forward(piece, step, number)
            with self.clock.part("student"):
                self.engine.backward(_carried(outputs, {name: share[number] for name, share in shares.items()}))
            if number + 1 < len(pieces):
                self.engine.accumulated()
        return pending

    def _inputs(self, batch: JointBatch) -> list[Inputs]:
        """The batch as one piece for each accumulation step."""
        count = self.engine.accumulation
        pairs: list[Inputs] = [(None, None)] * count
        if batch.pairs is not None:
            pixels, tokens = self._view(batch.pairs, "student", self.engine.dtype)
            pairs = list(zip(pixels.tensor_split(count), tokens.tensor_split(count), strict=True))
        if batch.questions is None:
            return pairs
        asked = batch.questions
        pixels_B = None if asked.pixels is None else normalise(asked.pixels, self._preprocess["student"], self.engine.dtype)
        questions = QuestionInputs(pixels_B, asked.ids_BL, asked.attend_BL, asked.image_mask_BL, asked.labels_BL).split(count)
        return [(*pair, *question) for pair, question in zip(pairs, questions, strict=True)]

    def _forward(self, inputs: Inputs, step: int, piece: int) -> dict[str, Tensor]:
        # Seeded by place, not by history: a resumed run and the second forward of a piece drop out what the first did.
        watchdog.beat("student", step)
        place = f"{self.recipe.seed}/{step}/{self.world.rank}/{piece}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest(), "big"))
        with self.clock.part("student"):
            return self.engine.forward(*inputs)

    def _losses(self, outputs: dict[str, Tensor], taught: list[Embeddings], learned: float, step: int) -> tuple[dict[str, Tensor], Tensor]:
        with self.clock.part("loss"):
            losses = self.task.losses(outputs, taught, learned, step)
            return losses, self.task.total(losses)

    def _teach(self, batch: Batch, role: str, teacher: AnyTeacher) -> Embeddings:
        size = self.engine.micro_batch
        if isinstance(teacher, StoredTeacher):
            assert batch.stored is not None, "the loader was given the store"
            assert batch.view is not None
            found = batch.stored
            return teacher.recall(found.image, found.text, found.known, batch.index, batch.view, found.damaged)
        pixels, tokens = self._view(batch, role, teacher.dtype)
        if isinstance(teacher, TextStoredTeacher):
            assert batch.stored is not None, "the loader was given the store"
            image_BD = torch.cat([teacher.embed_images(piece) for piece in pixels.split(size)])
            return teacher.join(image_BD, batch.stored.text, batch.stored.known, batch.index, batch.stored.damaged)
        parts = [teacher.embed(*piece) for piece in zip(pixels.split(size), tokens.split(size), strict=True)]
        return parts[0]._replace(image=torch.cat([part.image for part in parts]), text=torch.cat([part.text for part in parts]))

    def _view(self, batch: Batch, tower: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return normalise(batch.pixels[tower], self._preprocess[tower], dtype), batch.tokens[tower]

    def _announce(self, losses: dict[str, Tensor], scale: Tensor, batch: JointBatch) -> collectives.Pending:
        """Start telling the other ranks how this step stands; the backward runs meanwhile."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
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

    def _judge_data(self, bad: BadSamples) -> None:
        """The same numbers on every rank, so every rank stops or none."""
        self._bad.merge(bad)
        self._bad.check(self.recipe.data.max_bad_fraction, self.recipe.optim.batch, self.recipe.questions_in_a_step())

    def _write_row(self, step: int, agreed: StepSummary, images_per_second: float, elapsed: float) -> None:
        losses = dict(agreed.losses)
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


def _joined(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs of the micro-batches as those of the whole batch: rows concatenated, scalars once."""
    first = outputs[0]
    return {name: value if value.ndim == 0 else torch.cat([output[name] for output in outputs]) for name, value in first.items()}


def _shares(gradient: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """A joined output's gradient, cut into those of the pieces; each piece has an equal share of a scalar's."""
    if gradient.ndim == 0:
        return [gradient / len(outputs)] * len(outputs)
    return list(gradient.split([len(output) for output in outputs]))


def _carried(outputs: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradient is the cached one: the sum over outputs of <output, dL/doutput>."""
    return torch.stack([(output.float() * gradients[name].float()).sum() for name, output in outputs.items()]).sum()
