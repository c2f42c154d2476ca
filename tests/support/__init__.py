"""What tests of several folders share, imported as `support.runs` and so on; `programs/` has what they start as processes.

pytest finds it by `pythonpath` in pyproject.toml, started processes by `python_path`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
PROGRAMS = TESTS / "support" / "programs"


def python_path() -> str:
    """PYTHONPATH for a process that imports this checkout's megakd, kernels and `support`."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), str(REPOSITORY / "kernels"), str(TESTS), os.environ.get("PYTHONPATH")]))


def edit_json(path: Path, change: Callable[[Any], object] = lambda content: None, **values: Any) -> None:
    """Set keys of an object in a JSON file, or let `change` do something else to the content."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps({**content, **values} if values else content), encoding="utf-8")
