"""What tests of several folders share, imported as `support.runs` and so on; `programs/` has what they start as processes.

pytest finds it by `pythonpath` in pyproject.toml, started processes by `python_path`.
"""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
PROGRAMS = TESTS / "support" / "programs"


def python_path() -> str:
    """PYTHONPATH for a process that imports this checkout's megakd, kernels and `support`."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), str(REPOSITORY / "kernels"), str(TESTS), os.environ.get("PYTHONPATH")]))
