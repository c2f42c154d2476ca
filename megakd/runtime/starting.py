"""What the start of a program does without. Imports no torch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Around imports and checks: nearly all that they make stays, and the collector would look through a million objects again and again.

    That is a sixth of the time of torch's import, and half a second once all is imported.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()
