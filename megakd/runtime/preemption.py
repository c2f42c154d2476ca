"""What happens at a preemption, from the signal to the requeued job.

1. The signal. SLURM sends SIGTERM at a preemption, and before a time limit what `--signal` names: SIGUSR1 in slurm/*.sh and in jobs of
   `megakd submit`. SIGUSR2 counts too, as NCCL may take SIGUSR1 for itself. From its first line on the program notes the latter two
   (`note_early`), and from the moment it trains all three (`StopRequest`). A handler only notes: nothing is saved inside of one.
2. All ranks agree. The signal may reach one rank before another, so each step sums the ranks' flags (`Trainer`); once one is set, all stop
   after the same step. Work without steps, an evaluation, asks between batches: `StopPoller`.
3. The checkpoint. `training/run.py` writes it as at any other step, and `Interrupted` ends the run. Where an evaluation is stopped the
   steps before it are saved, and the next start evaluates first.
4. The exit code. Every rank ends with 85 (`exits.EXIT_SAVED`), and from its last line on ignores signals (`ignore_from_here`), which would
   change that code.
5. The queue. The batch shell sees 85 and sends its own job back into the queue: `jobs/requeue.sh`, in slurm/*.sh and in jobs of
   `megakd submit`. A user at a terminal starts the same command again instead.
6. The next start finds the newest valid checkpoint in the run folder and goes on at the same step, to the same bits: `training/run.py`.

Nothing here imports torch at the module's level: train.py and jobs/task.py note signals before torch is there, which takes ten seconds.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from megakd.runtime.exits import Interrupted

if TYPE_CHECKING:
    from megakd.runtime.launch import World

T = TypeVar("T")
WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EARLY = (signal.SIGUSR1, signal.SIGUSR2)
# Batches between two questions for a signal: to ask at each would make every rank wait for the slowest at each.
_BATCHES_BETWEEN = 4
_early: signal.Signals | None = None


def note_early() -> None:
    """From a program's first line on, note the signals that schedulers announce a stop with, until a StopRequest takes them over.

    Unnoted they end a process, and one rank of a job that is still starting would fail it. SIGTERM keeps its action until then: it is
    what launchers end the other ranks of a failed start with.
    """

    def note(number: int, frame: FrameType | None) -> None:
        global _early  # there is one program, and one start of it
        _early = signal.Signals(number)

    for number in EARLY:
        signal.signal(number, note)


def ignore_from_here() -> None:
    """At a program's last line. Python puts SIGTERM's default action, death, back while it ends, which takes half a second with torch;
    a launcher that signals the other ranks as soon as one has ended would change their exit codes."""
    for number in WATCHED:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """True once one of the watched signals has arrived, from creation to the end of the block.

    At the end a calling program's own handlers are put back, so that submitit, for one, hears of later signals again. The default
    action, death, is not: a launcher that signals the other ranks as soon as one has ended would change their exit codes.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = _early
        self._earlier: dict[signal.Signals, Callable[[int, FrameType | None], object]] = {}
        for number in WATCHED:
            handler = signal.signal(number, self._note)
            if callable(handler):
                self._earlier[number] = handler

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)


class StopPoller:
    """Asks on all ranks together whether a signal has come to any of them. stop None: none is looked for.

    An error in one rank's batches waits for the next such question: every rank raises it there, and none is left in a collective.
    """

    def __init__(self, world: World, stop: StopRequest | None = None) -> None:
        self._world, self._stop = world, stop
        self._failure: Exception | None = None

    def check(self) -> None:
        """A collective. Raises Interrupted on every rank once a signal has come to one, and the error that a rank met with."""
        import torch

        from megakd.runtime import collectives

        # on the CPU, as collectives.barrier
        flags = torch.tensor([float(bool(self._stop)), float(self._failure is not None)])
        stopped, failed = collectives.start_sum(flags, self._world).read()
        if failed:
            mine, self._failure = self._failure, None
            raise next(error for error in (mine, *collectives.everyones(mine, self._world)) if error is not None)
        if stopped:
            raise Interrupted

    def between(self, batches: Iterator[T], rows: int, size: int) -> Iterator[T]:
        """This rank's `batches` of `size`, of a set of `rows` that is split evenly over the ranks; `check` before each few of them.

        Ranks may have one batch less than others, or none, and ask as often as those. Raises what `check` does.
        """
        most = -(-rows // self._world.size)
        for number in range(-(-most // size)):
            if number % _BATCHES_BETWEEN == 0:
                self.check()
            if (batch := self._next(batches)) is not None:
                yield batch
        self.check()
        assert next(batches, None) is None, "a rank has more batches than its share"

    def _next(self, batches: Iterator[T]) -> T | None:
        if self._failure is not None:
            return None
        try:
            return next(batches, None)
        except (ValueError, OSError) as error:
            self._failure = error
            return None
