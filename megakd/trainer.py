"""The one fit loop: batches -> teacher -> student -> losses -> update -> log, evaluate, checkpoint.

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

from megakd.data.bad import BadCounter
from megakd.data.loader import Batch
from megakd.data.views import normalise
from megakd.models.embeddings import Embeddings
from megakd.models.stored_teacher import StoredTeacher, TextStoredTeacher
from megakd.models.student import embeddings
from megakd.models.teacher import Teacher
from megakd.recipe import Optim, Recipe
from megakd.runtime import collectives, watchdog
from megakd.runtime.checkpoint import Progress
from megakd.runtime.engine import Engine
from megakd.runtime.launch import World
from megakd.runtime.runlog import RunLog, memory_gb
from megakd.runtime.signals import LossNotFinite, StopRequest
from megakd.runtime.stopwatch import Stopwatch
from megakd.tasks.distill import Distill

AnyTeacher = Teacher | StoredTeacher | TextStoredTeacher


class Hooks(Protocol):
    """What the job does at step boundaries; every rank calls both."""

    def save(self, progress: Progress) -> None: ...

    def evaluate(self, step: int) -> None: ...


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step after one small all-reduce."""

    losses: dict[str, float]
    finite: bool
    stop: bool
    log_failed: bool
    bad: BadCounter


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
        task: Distill,
        teachers: Mapping[str, AnyTeacher],
        preprocess: dict[str, PreprocessCfg],
        log: RunLog,
        stop: StopRequest,
    ) -> None:
        """teachers: by role, as the recipe's `teachers()`; preprocess: of the student and of each live teacher, by the same names."""
        self.recipe, self.world, self.engine, self.task, self.teachers = recipe, world, engine, task, teachers
        self._preprocess, self._log, self._stop = preprocess, log, stop
        self.clock = Stopwatch(world.device)
        self._bad = BadCounter()

    def fit(self, batches: Iterator[Batch], start: Progress, hooks: Hooks) -> bool:
        """Train from `start` to the last step. Returns True when it got there, False when a signal stopped it after a save."""
        recipe, step = self.recipe, start.step
        since, images = time.perf_counter(), 0
        while step < recipe.optim.steps:
            watchdog.beat("waiting for data", step)
            with self.clock.host("data"):
                batch = next(batches)
            agreed = self.step(batch, step)
            step, images = step + 1, images + recipe.optim.batch
            last = step == recipe.optim.steps
            if step % recipe.log.every == 0 or last or agreed.stop:
                now = time.perf_counter()
                self._write_row(step, agreed, images / (now - since), now - since)
                since, images = now, 0  # what writing takes counts in the next row
            if agreed.stop or last or step % recipe.checkpoint.every == 0:
                self._refuse_to_save_ruins(step)
                hooks.save(replace(start, step=step, position=batch.next_position))
            if agreed.stop and not last:
                return False
            if not last and recipe.evaluation.every and step % recipe.evaluation.every == 0:
                hooks.evaluate(step)
                since, images = time.perf_counter(), 0
        return True

    def _refuse_to_save_ruins(self, step: int) -> None:
        """A finite loss may have a gradient that is not, which shows in the loss one step later: too late for this checkpoint."""
        if not math.isfinite(self.engine.gradient_norm):
            raise LossNotFinite(f"step {step}: the gradient norm is {self.engine.gradient_norm}; this step was not saved")

    def step(self, batch: Batch, step: int) -> Agreed:
        """One update on one global batch. Raises on every rank, before any weight moves, LossNotFinite or what the log met with."""
        watchdog.beat("teacher", step)
        batch = batch.to(self.world.device, non_blocking=True)
        with self.clock.part("teacher"):
            taught = [self._teach(batch, role, teacher) for role, teacher in self.teachers.items()]
        gradients = self._exact_accumulation if self.engine.accumulation > 1 else self._whole_batch
        agreed = self._agree(gradients(batch, taught, step), batch)
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

    def _whole_batch(self, batch: Batch, taught: list[Embeddings], step: int) -> collectives.Pending:
        outputs = self._forward(self._view(batch, "student", self.engine.dtype), step, 0)
        losses, total = self._losses(outputs, taught)
        pending = self._announce(losses, outputs, batch)
        with self.clock.part("student"):
            self.engine.backward(total)
        return pending

    def _exact_accumulation(self, batch: Batch, taught: list[Embeddings], step: int) -> collectives.Pending:
        size = self.engine.micro_batch
        pixels, tokens = self._view(batch, "student", self.engine.dtype)
        pieces = list(zip(pixels.split(size), tokens.split(size), strict=True))
        with torch.no_grad():
            cached = _joined([self._forward(piece, step, number) for number, piece in enumerate(pieces)])
        leaves = {name: value.detach().requires_grad_() for name, value in cached.items()}
        losses, total = self._losses(leaves, taught)
        pending = self._announce(losses, leaves, batch)
        total.backward()  # type: ignore[no-untyped-call]
        for number, piece in enumerate(pieces):
            outputs = self._forward(piece, step, number)
            with self.clock.part("student"):
                self.engine.backward(_carried(outputs, leaves, number * size, len(pieces)))
            if number + 1 < len(pieces):
                self.engine.accumulated()
        return pending

    def _forward(self, views: tuple[Tensor, Tensor], step: int, piece: int) -> dict[str, Tensor]:
        # Seeded by place, not by history: a resumed run and the second forward of a piece drop out what the first did.
        watchdog.beat("student", step)
        place = f"{self.recipe.seed}/{step}/{self.world.rank}/{piece}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest(), "big"))
        with self.clock.part("student"):
            return self.engine.forward(*views)

    def _losses(self, outputs: dict[str, Tensor], taught: list[Embeddings]) -> tuple[dict[str, Tensor], Tensor]:
        with self.clock.part("loss"):
            losses = self.task.losses(embeddings(outputs), taught)
            return losses, self.task.total(losses)

    def _teach(self, batch: Batch, role: str, teacher: AnyTeacher) -> Embeddings:
        size = self.engine.micro_batch
        if isinstance(teacher, StoredTeacher):
            assert batch.stored is not None, "the loader was given the store"
            assert batch.view is not None
            return teacher.recall(*batch.stored, batch.index, batch.view)
        pixels, tokens = self._view(batch, role, teacher.dtype)
        if isinstance(teacher, TextStoredTeacher):
            assert batch.stored is not None, "the loader was given the store"
            image_BD = torch.cat([teacher.embed_images(piece) for piece in pixels.split(size)])
            return teacher.join(image_BD, batch.stored.text, batch.stored.known, batch.index)
        parts = [teacher.embed(*piece) for piece in zip(pixels.split(size), tokens.split(size), strict=True)]
        return parts[0]._replace(image=torch.cat([part.image for part in parts]), text=torch.cat([part.text for part in parts]))

    def _view(self, batch: Batch, tower: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return normalise(batch.pixels[tower], self._preprocess[tower], dtype), batch.tokens[tower]

    def _announce(self, losses: dict[str, Tensor], outputs: dict[str, Tensor], batch: Batch) -> collectives.Pending:
        """Start telling the other ranks how this step stands; the backward runs meanwhile."""
        values = torch.stack([loss.detach().float() for loss in losses.values()] + [outputs["scale"].detach().float().reshape(())])
        wrong = (~values.isfinite()).any().float().reshape(1)
        flags = [float(bool(self._stop)), float(self._log.failure is not None)]
        counts = torch.tensor([*flags, *map(float, batch.bad.to_list())], device=values.device)
        return collectives.start_sum(torch.cat([wrong, values.nan_to_num() / self.world.size, counts]), self.world)

    def _agree(self, pending: collectives.Pending, batch: Batch) -> Agreed:
        wrong, *values = pending.read()
        names = [*self.task.weights, "scale"]
        means, (stop, log_failed, *counts) = values[: len(names)], values[len(names) :]
        bad = BadCounter.from_list([int(count) for count in counts], batch.bad.examples)
        return Agreed(dict(zip(names, means, strict=True)), wrong == 0, stop > 0, log_failed > 0, bad)

    def _judge_data(self, bad: BadCounter) -> None:
        """The same numbers on every rank, so every rank stops or none."""
        self._bad.merge(bad)
        if bad.total:
            self._bad.check(self.recipe.data.max_bad_fraction, at_least=self.recipe.optim.batch)

    def _write_row(self, step: int, agreed: Agreed, images_per_second: float, elapsed: float) -> None:
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
            "scale": scale,
            "gradient_norm": self.engine.gradient_norm,
            "images_per_second": images_per_second,
            "memory_gb": memory_gb(self.world.device),
            "seconds": {**seconds, "other": elapsed - sum(seconds.values())},
            "bad_samples": self._bad.counts,
        }
        self._log.row(row, self.recipe.optim.steps)
        flat = {"loss": total, **losses, "lr": row["lr"], "scale": scale, "images_per_second": images_per_second}
        self.engine.monitor(flat, step * self.recipe.optim.batch)


def _joined(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs of the micro-batches as those of the whole batch: rows concatenated, scalars once."""
    first = outputs[0]
    return {name: value if value.ndim == 0 else torch.cat([output[name] for output in outputs]) for name, value in first.items()}


def _carried(outputs: dict[str, Tensor], leaves: dict[str, Tensor], start: int, pieces: int) -> Tensor:
    """A scalar whose gradient is the cached one: sum over outputs of <output, dL/doutput>, each scalar's share 1/pieces."""
    terms = []
    for name, output in outputs.items():
        gradient = leaves[name].grad
        if gradient is None:
            gradient = torch.zeros_like(leaves[name])
        piece = gradient / pieces if output.ndim == 0 else gradient[start : start + len(output)]
        terms.append((output.float() * piece.float()).sum())
    return torch.stack(terms).sum()
