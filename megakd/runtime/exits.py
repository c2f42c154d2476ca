"""How a run ends early: its exit codes, a loss that is not finite, and the signals that ask for a checkpoint.

SIGTERM, SIGUSR1 and SIGUSR2 ask for a checkpoint at the next step boundary; the handler only notes it. In an evaluation, `preemption`
looks for it between batches.

SLURM sends TERM at preemption and whatever `--signal` names before a time limit; NCCL may take USR1 for itself, hence both.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

EXIT_SAVED = 85  # stopped by a signal after saving: start the same command again to go on
EXIT_USER_ERROR = 2  # a mistake in the recipe, the data or the command, said in one message
EXIT_NOT_FINITE = 86  # the loss became NaN or infinite; the last checkpoint is from before that
EXIT_HUNG = 87  # no progress for `watchdog.limit` seconds: every rank wrote its stacks and ended


class LossNotFinite(ArithmeticError):
    """The loss, or its gradient, was NaN or infinite on some rank; nothing of that step was saved."""


class Interrupted(Exception):
    """A signal asks for the end, every rank has heard of it, and what has to be kept is saved, or about to be by who catches this."""


WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


EARLY = (signal.SIGUSR1, signal.SIGUSR2)
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
