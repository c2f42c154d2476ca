"""The environment of lmms-eval, which is built once and kept."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def harness_python() -> Path:
    """A python that imports lmms-eval; skips, with the reason, where none can be made."""
    from support.library_environments import LMMS_EVAL, set_up

    try:
        return set_up(LMMS_EVAL)
    except ValueError as error:
        pytest.skip(str(error))
