"""A virtual environment with lmms-eval, built once: a minute, 900 MB. It sees this program's packages, torch among them, by a path file.

$MEGAKD_LMMS_ENV names another place for it, or one that somebody has prepared: that is used as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megakd.benchmarks.environment import cache

VARIABLE, REQUIREMENT = "MEGAKD_LMMS_ENV", "lmms-eval==0.7.3"


def set_up() -> Path:
    """The environment's python. Raises ValueError when lmms-eval cannot be installed in it."""
    folder = Path(
        os.environ.get(VARIABLE) or cache() / f"{REQUIREMENT.replace('==', '-')}-py{sys.version_info.major}{sys.version_info.minor}"
    )
    python, done = folder / "bin" / "python", folder / "complete"
    if done.exists() or (VARIABLE in os.environ and python.exists()):
        return python
    _run(sys.executable, "-m", "venv", "--clear", str(folder))
    site = next((folder / "lib").glob("python*/site-packages"))
    host = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "megakd-host.pth").write_text("".join(f"{path}\n" for path in host), encoding="utf-8")
    _run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20", REQUIREMENT)
    done.touch()
    return python


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-4:])
        raise ValueError(f"no environment for lmms-eval ({VARIABLE} may name one): {' '.join(command)} said\n{said}")
