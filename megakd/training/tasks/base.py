"""The contract of a task: one kind of data with its losses. A run has one or several, in the order in which they are prepared.

1. `TaskData` is a task before the run: settings, data and models' configurations, found to be sound without a model.
2. `TaskData.start` loads what is frozen and gives the `Task` of a run, which adds its parts to the one module that the engine trains.
3. In every step `Task.part` says what the module is given and how losses come of its outputs, see `Trainer.step`.
4. The task scores what it has trained, and writes it at the end.

How to add one: README.md of `training/`.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from megakd.data.bad_samples import BadCounter, Reason
from megakd.data.mixture import MixtureOrder
from megakd.data.resumable import Loading, ResumableBatches
from megakd.models.student import Student
from megakd.recipe import Recipe
from megakd.runtime.checkpoint import Progress
from megakd.runtime.ds_config import DsConfig
from megakd.runtime.gathered import Gathered
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.runtime.run_folder import RunLog


def loading(recipe: Recipe, world: World, start_position: int) -> Loading:
    """How this rank loads what it trains on."""
    workers, pin = recipe.data.workers, world.device.type == "cuda"
    return {"rank": world.rank, "world": world.size, "start_position": start_position, "workers": workers, "pin_memory": pin}


class TaskBatch(Protocol):
    """One rank's part of a task's global batch. bad: what this rank skipped for it; next_position: what resumes after it.

    index: (B,) int64 on the CPU, the items that were used.
    """

    @property
    def index(self) -> Tensor: ...

    @property
    def next_position(self) -> int: ...

    @property
    def bad(self) -> BadCounter: ...

    def to(self, device: torch.device, non_blocking: bool) -> Self: ...


@dataclass(frozen=True)
class StepPart:
    """A task's part of one step. inputs: for each micro-batch, arguments of the module's forward by names that no other task has.

    losses: the module's outputs -> unweighted float32 scalars by name, in the order of the task's `weights`.
    rows: of a mixture, the outputs that losses were given, in order -> the losses row by row, by the task's `of_rows`; a collective.
    """

    inputs: list[dict[str, Any]]
    losses: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    rows: Callable[[list[dict[str, Tensor]]], dict[str, RowLoss]] | None = None


class RowLoss(NamedTuple):
    """A loss of each of this rank's B rows, summed over what of the row it is a mean of; (B,) each, without gradient."""

    sum_B: Tensor
    count_B: Tensor


class Task(ABC):
    """A task in a run that has started.

    weights: of its losses, by name, where they move the largest; backends: which implementation computes them, where there are several.
    adds_up: whether the losses of micro-batches add up to those of the batch, as sums over samples do. Others take two forwards, see
    `accumulation`. logged: outputs of the module, and names in `values`, scalars, that are logged beside the losses.
    items, in_a_step: what its data are, for messages, and how many of them a step takes over all ranks.
    mixture: the order of its data where sources are mixed by weights. of_rows: names of the losses that `StepPart.rows` then gives.
    learns: prefixes of the parameters' names that it trains. rates: learning rates other than the recipe's, by such prefixes.
    roles: its teachers. in_step: of them, those whose forward is a collective on the device, see `feed`.
    """

    weights: Mapping[str, float]
    backends: Mapping[str, str] = {}
    adds_up: bool
    logged: tuple[str, ...] = ()
    items: str
    in_a_step: int
    mixture: MixtureOrder | None = None
    of_rows: tuple[str, ...] = ()
    learns: tuple[str, ...] = ("",)
    rates: Mapping[str, float] = {}
    roles: tuple[str, ...] = ()
    in_step: frozenset[str] = frozenset()

    @abstractmethod
    def extend(self, module: Student, device: torch.device) -> Student:
        """The module with this task's parts, their weights loaded or drawn from torch's generator; on the CPU but for quantised ones."""

    @abstractmethod
    def keep_replica(self) -> None:
        """Before the engine takes the complete module, to part its weights perhaps: copy what evaluations need whole."""

    @abstractmethod
    def open(self, progress: Progress) -> ResumableBatches[Any, Any]:
        """Its batches from where `progress` stands; called once, before the first step of this start."""

    def teach(self, batch: Any, role: str, step: int) -> Any:
        """What the teacher `role` says of `batch`, which the step number `step` learns from: tensors on the device, or what holds them.

        It may be asked while the step before is at work (`feed`), so it reads nothing that a step moves. A collective.
        """
        raise NotImplementedError(f"{type(self).__name__} has no teacher {role}")

    @abstractmethod
    def part(self, batch: Any, taught: Mapping[str, Any], step: int) -> StepPart:
        """What the step number `step` (from 0) makes of `batch`, which is on the device. taught: by role, what `teach` gave."""

    def weights_at(self, step: int) -> Mapping[str, float]:
        """Of its losses in the step number `step`, from 0."""
        return self.weights

    def gathered(self) -> Gathered | None:
        """Of partitioned teachers, since the last call; None without one."""
        return None

    def values(self) -> dict[str, Tensor]:
        """Scalars that the last losses went by, on the device and equal on every rank, for `logged`; GROUP.NAME is logged in a group."""
        return {}

    def stepped(self) -> None:  # noqa: B027 - most have nothing to look at
        """After the first step of this start; every rank calls it. Raises ValueError for what only a backward shows."""

    def state(self) -> dict[str, Tensor]:
        """What its losses keep from step to step, for a checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most keep nothing
        """Give the losses what `state` returned."""

    @abstractmethod
    def evaluate(self, weights: dict[str, Tensor], step: int, folder: Path, interruptions: StopPoller) -> dict[str, Any]:
        """Its scores as `evaluation.json` holds them, the same on every rank; {} without sets. weights: of `step`, from the engine.

        A collective. Raises Interrupted, on every rank, when a signal comes to one.
        """

    @abstractmethod
    def write(self, weights: dict[str, Tensor], folder: Path) -> None:
        """What was trained, into the run folder `folder`. Rank 0 alone."""


class TaskData(Protocol):
    """A task whose settings, data and models' configurations were found to be sound. Nothing expensive has happened."""

    @property
    def key(self) -> str:
        """The recipe's key of its data, for messages."""

    @property
    def result(self) -> str:
        """The folder in a run folder that `Task.write` leaves."""

    @property
    def sets(self) -> object:
        """What it is scored on; false where there is nothing."""

    def signature(self, *, of_names: bool = False) -> int:
        """Of its data. of_names: of shards by name and length alone, see `PreparedRun.signature`."""

    def describe(self) -> list[str]:
        """For the run's first lines: from what is learned, and how."""

    def preview(self, world: World) -> list[str]:
        """For `--dry_run`: its data and the models' shapes. Raises ValueError for what shows when samples are decoded and shapes meet."""

    def start(self, config: DsConfig, world: World, log: RunLog) -> Task:
        """With what is frozen loaded. A collective."""


@dataclass(frozen=True)
class BadSamples:
    """What was bad in the data of each task, by what they are: many good pairs would hide that hardly a question is usable."""

    by_items: dict[str, BadCounter]

    def merge(self, other: BadSamples) -> None:
        for items, counter in self.by_items.items():
            counter.merge(other.by_items[items])

    @property
    def counts(self) -> dict[Reason, int]:
        """Of all, by reason."""
        together = BadCounter()
        for counter in self.by_items.values():
            together.merge(counter)
        return together.counts

    def to_list(self) -> list[int]:
        """As BadCounter's: of fixed length, to be summed over ranks."""
        return [count for counter in self.by_items.values() for count in counter.to_list()]

    @classmethod
    def from_list(cls, values: Sequence[int], here: BadSamples) -> BadSamples:
        """The inverse of `to_list`, with this rank's examples."""
        rest = iter(values)
        parts = {items: list(itertools.islice(rest, len(counter.to_list()))) for items, counter in here.by_items.items()}
        return cls({items: BadCounter.from_list(parts[items], counter) for items, counter in here.by_items.items()})

    def check(self, max_bad_fraction: float, in_a_step: Mapping[str, int]) -> None:
        """Raises ValueError when too many of any are bad, judged from at least a step's of them seen."""
        for items, counter in self.by_items.items():
            counter.check(max_bad_fraction, at_least=in_a_step[items], what=items)
