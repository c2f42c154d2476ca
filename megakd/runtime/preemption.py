"""What happens at a preemption, from the signal to the requeued job.

1. The signal. SLURM sends SIGTERM at a preemption, and before a time limit what `--signal` names: SIGUSR1 in slurm/*.sh and in jobs of
   `megakd submit`; SIGUSR2 counts too, as NCCL may take SIGUSR1. From its first line on the program notes the latter two (`note_early`),
   and while it trains all three (`StopRequest`). A handler only notes the signal.
2. All ranks agree. The signal may reach one rank before another, so each step sums the ranks' flags (`Trainer`), and all stop after the
   same step. An evaluation, which has no steps, asks between batches (`StopPoller`).
3. The checkpoint. `training/run.py` writes it as at any other step, and `Interrupted` ends the run. Where an evaluation is stopped the
   steps before it are saved, and the next start evaluates first.
4. The exit code. Every rank ends with 85 (`exits.EXIT_SAVED`), and at its last line ignores further signals (`ignore_from_here`).
5. The queue. The batch shell sees 85 and requeues its own job: `jobs/requeue.sh`, in slurm/*.sh and in jobs of `megakd submit`. A user at
   a terminal starts the same command again instead.
6. The next start finds the newest valid checkpoint in the run folder and goes on at the same step, to the same bits: `training/run.py`.

torch is not imported at the module's level: train.py and jobs/task.py note signals in the ten seconds before it is there.
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
_BATCHES_BETWEEN = 4  # two checks, at each of which every rank waits for the slowest
_early: signal.Signals | None = None


def note_early() -> None:
    """From a program's first line on, note the signals by which schedulers announce a stop, until a StopRequest does.

    Otherwise they would end a rank of a job that is still starting. SIGTERM keeps its action until then: with it launchers end the other
    ranks of a failed start.
    """

    def note(number: int, frame: FrameType | None) -> None:
        global _early  # of the process
        _early = signal.Signals(number)

    for number in EARLY:
        signal.signal(number, note)


def ignore_from_here() -> None:
    """At a program's last line: Python restores SIGTERM's default action while it ends, for half a second with torch, and a launcher that
    signals the other ranks as soon as one has ended would change their exit codes."""
    for number in WATCHED:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """True once one of the watched signals has arrived, from creation to the end of the block.

    At the end a calling program's own handlers, such as submitit's, are put back, but not the default action; see `ignore_from_here`.
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
    """Asks on all ranks together whether a signal has come to any of them. stop None: there are no signals.

    An error in one rank's batches waits for the next `check`, where every rank raises it.
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
        """This rank's `batches` of `size`, of a set of `rows` that is split evenly over the ranks, with a `check` before each few of them.

        Ranks may have one batch less than others, or none, and check as often as those.
        """
        most = -(-rows // self._world.size)
        for number in range(-(-most // size)):
            if number % _BATCHES_BETWEEN == 0:
                self.check()
            if self._failure is not None:
                continue
            try:
                batch = next(batches, None)
            except (ValueError, OSError) as error:
                self._failure = error
            else:
                if batch is not None:
                    yield batch
        self.check()
        assert next(batches, None) is None, "a rank has more batches than its share"
