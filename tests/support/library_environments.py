"""Virtual environments for libraries that ours are compared with and that nothing else needs: each is built once and kept.

They see this program's packages, torch among them, by a path file. A variable names another place for one, or one that somebody has
prepared: that is used as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megakd.benchmarks.common.environment import cache


@dataclass(frozen=True)
class Library:
    """requirements: the first one names the folder. alone: without what they ask for, which is here already or for other metrics."""

    variable: str
    requirements: tuple[str, ...]
    alone: bool = False


LMMS_EVAL = Library("MEGAKD_LMMS_ENV", ("lmms-eval==0.7.3",))  # a minute, 900 MB
# Two megabytes: its scikit-learn and pycocoevalcap are for metrics that are not compared.
CLIP_BENCHMARK = Library(
    "MEGAKD_CLIP_BENCHMARK_ENV",
    ("clip_benchmark==1.6.2", "webdataset==1.0.2", "braceexpand", "requests", "urllib3", "idna", "certifi", "charset-normalizer", "pyyaml"),
    alone=True,
)


def set_up(library: Library) -> Path:
    """The environment's python. Raises ValueError when the library cannot be installed in it."""
    first = library.requirements[0]
    folder = Path(
        os.environ.get(library.variable) or cache() / f"{first.replace('==', '-')}-py{sys.version_info.major}{sys.version_info.minor}"
    )
    python, done = folder / "bin" / "python", folder / "complete"
    if done.exists() or (library.variable in os.environ and python.exists()):
        return python
    try:
        beside_ours(folder)
    except subprocess.CalledProcessError as error:
        raise ValueError(f"no environment for {first} ({library.variable} may name one): {error}\n{error.stderr}") from error
    quick = ("--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20")
    _run(library, str(python), "-m", "pip", "install", *quick, *(["--no-deps"] if library.alone else []), *library.requirements)
    done.touch()
    return python


def beside_ours(folder: Path) -> Path:
    """Make a virtual environment in `folder` that sees this one's packages, but not an editable megakd. Returns its python."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, capture_output=True, text=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    host = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "megakd-host.pth").write_text("".join(f"{path}\n" for path in host), encoding="utf-8")
    return folder / "bin" / "python"


def _run(library: Library, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-4:])
        name = library.requirements[0].partition("==")[0]
        raise ValueError(f"no environment for {name} ({library.variable} may name one): {' '.join(command)} said\n{said}")
