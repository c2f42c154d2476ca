"""What a step is given: its batches on the device, and what their teachers say of them.

With `data.prefetch` that is prepared one step ahead, on a stream of its own. While the device works on step i, batch i+1 is taken from the
loader, moved, and shown to the teachers: beside the student's work, and beside the wait for data. What is taken is in the order of a run
without it, and nothing is taken ahead of a save, an evaluation or the end: a position is that of what was learned from, and an error of the
next batch ends the run where nothing would have been kept of this step.

A teacher whose forward is a collective is asked in its own step, on the step's stream: NCCL's kernels of two process groups that run beside
each other may wait for each other on different ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megakd.recipe import Recipe
from megakd.runtime import watchdog
from megakd.runtime.launch import World
from megakd.runtime.side_stream import Handed, SideStream
from megakd.runtime.stopwatch import Stopwatch
from megakd.teachers.build import communicates
from megakd.training.tasks.base import Task, TaskBatch

# One rank's part of a step: of each task, in the order of the tasks.
Batches = tuple[TaskBatch, ...]


class Given(NamedTuple):
    """One rank's part of a step, on the device. taught: of each task, what its teachers gave, by their roles."""

    batches: Batches
    taught: tuple[dict[str, Any], ...]


class Feed:
    """Gives the steps of a run what they learn from, in order."""

    def __init__(self, batches: Iterator[Batches], tasks: Sequence[Task], world: World, clock: Stopwatch, *, ahead: bool) -> None:
        self._batches, self._tasks, self._device, self._clock = batches, tasks, world.device, clock
        self._side = SideStream(world.device) if ahead else None
        self._next: Handed[Given] | None = None
        self._ahead = self._ready = 0

    def fetch(self, step: int) -> None:
        """Prepare step number `step`, which comes next, without waiting for what the device does; nothing without `ahead`."""
        if self._side is not None:
            with self._clock.part("data"):  # of the device's time what it has nothing else to do in
                batches = self._taken(step)
            self._next = self._prepared(self._side, batches, step)
            self._ahead += 1

    def take(self, step: int) -> Given:
        """What step number `step` learns from. A collective where a teacher's forward is one."""
        handed, self._next = self._next, None
        if handed is not None:
            self._ready += handed.is_there
        else:
            with self._clock.host("data"):
                batches = self._taken(step)
            if self._side is None:
                return self._taught(self._moved(batches), step)
            self._side.follow()  # models, and what evaluations left behind
            handed = self._prepared(self._side, batches, step)
        with self._clock.part("teacher"):
            given = handed.take()
        return self._taught(given, step)

    def counts(self) -> dict[str, float]:
        """Since the last call, with `ahead`: batches that were prepared ahead, those of them that were there when their step asked, and
        the seconds of the stream beside the step's by part, which a CPU does not have."""
        if self._side is None:
            return {}
        counts: dict[str, float] = {"batches": self._ahead, "ready": self._ready}
        self._ahead = self._ready = 0
        return counts | {f"{name}_seconds": seconds for name, seconds in self._clock.read_beside().items()}

    def _taken(self, step: int) -> Batches:
        watchdog.beat("waiting for data", step)
        return next(self._batches)

    def _moved(self, batches: Batches) -> Given:
        return Given(tuple(batch.to(self._device, non_blocking=True) for batch in batches), tuple({} for _ in batches))

    def _prepared(self, side: SideStream, batches: Batches, step: int) -> Handed[Given]:
        with side.issuing():
            return side.hand_over(self._taught(self._moved(batches), step, beside=True))

    def _taught(self, given: Given, step: int, *, beside: bool = False) -> Given:
        """With what the teachers say that have not been asked. beside: those alone that may be asked beside a step."""
        watchdog.beat("teacher", step)
        with self._clock.part("teacher", beside=beside):
            taught = tuple(
                known
                | {
                    role: task.teach(batch, role, step)
                    for role in task.roles
                    if role not in known and not (beside and role in task.in_step)
                }
                for task, batch, known in zip(self._tasks, given.batches, given.taught, strict=True)
            )
        return given._replace(taught=taught)


def outline(recipe: Recipe, world: World) -> list[str]:
    """What is prepared ahead, in words; nothing without `data.prefetch`."""
    if not recipe.data.prefetch:
        return []
    teachers = recipe.weighted_teachers() if recipe.in_need_of_a_teacher() else {}
    in_step = [role for role, settings in teachers.items() if communicates(settings, world)]
    ahead = [role for role in teachers if role not in in_step]
    if recipe.answers is not None and recipe.answers.teacher is not None:
        ahead.append("answers.teacher")
    shown = f", and shown to {', '.join(ahead)}," if ahead else ""
    kept = f"; {', '.join(in_step)}: in its own step, as ranks talk in it" if in_step else ""
    return [f"ahead: the next batch is taken{shown} while the device works on a step{kept}"]
