"""How the program ends: its exit codes, and the two exceptions that are no mistake of the user's."""

from __future__ import annotations

# of `megakd doctor`: something that training needs fails on this machine; of `megakd data check`: a run would refuse the data
EXIT_UNFIT = 1
EXIT_LOST_PEER = 1  # another rank ended without a word, or the connection to it broke
EXIT_USER_ERROR = 2  # a mistake in the recipe, the data or the command, said in one message
EXIT_SAVED = 85  # stopped by a signal after saving: start the same command again to go on
EXIT_NOT_FINITE = 86  # the loss became NaN or infinite; the last checkpoint is from before that
EXIT_HUNG = 87  # no progress for `watchdog.limit` seconds: every rank wrote its stacks and ended
EXIT_INTERRUPTED = 130  # Ctrl-C


class LossNotFinite(ArithmeticError):
    """The loss, or its gradient, was NaN or infinite on some rank; nothing of that step was saved."""


class Interrupted(Exception):
    """A signal asks for the end, every rank has heard of it, and what has to be kept is saved, or about to be by who catches this."""
