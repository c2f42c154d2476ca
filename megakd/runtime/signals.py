"""How a run ends early: its exit codes, a loss that is not finite, and the signals that ask for a checkpoint.

SIGTERM, SIGUSR1 and SIGUSR2 ask for a checkpoint at the next step boundary; the handler only notes it.

SLURM sends TERM at preemption and whatever `--signal` names before a time limit; NCCL may take USR1 for itself, hence both.
"""

from __future__ import annotations

import signal
from types import FrameType

EXIT_SAVED = 85  # stopped by a signal after saving: start the same command again to go on
EXIT_USER_ERROR = 2  # a mistake in the recipe, the data or the command, said in one message
EXIT_NOT_FINITE = 86  # the loss became NaN or infinite; the last checkpoint is from before that


class LossNotFinite(ArithmeticError):
    """The loss, or its gradient, was NaN or infinite on some rank; nothing of that step was saved."""


WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """True once one of the watched signals has arrived."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in WATCHED:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None
