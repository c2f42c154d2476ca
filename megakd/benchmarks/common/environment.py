"""A separate environment for open_clip's training program, built once and kept.

It is a virtual environment that sees this program's packages (torch, open_clip and the open_clip_train that comes with it) through
a path file and adds what those need and this program does not: nothing of 3 GB is downloaded twice, both sides run the same torch,
and webdataset never enters this program's own environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from megakd.benchmarks.common.children import environ
from megakd.runtime.files import users_cache

VARIABLE = "MEGAKD_BENCH_ENV"
STAMP = "megakd-bench.json"
# 0.2.86 is open_clip_torch[training]'s own upper bound: versions from 0.2.97 on, 1.0 among them, end a shard with a marker that
# open_clip 3.3.0's loader takes for a sample (KeyError: 'fname').
REQUIREMENTS = ("webdataset==0.2.86", "pandas>=2.2,<4")
_PROBE = (
    "import json, open_clip_train.main, open_clip_train.data, webdataset, pandas, open_clip, torch;"
    "print(json.dumps({'webdataset': webdataset.__version__, 'pandas': pandas.__version__,"
    " 'open_clip_torch': open_clip.__version__, 'torch': torch.__version__}))"
)


@dataclass(frozen=True)
class Environment:
    """A python that runs `open_clip_train`, and what it imports, by version."""

    python: Path
    versions: dict[str, str]


def cache() -> Path:
    """Where environment, shards and weights stay between runs. Raises ValueError for a user without a home directory."""
    if (users := users_cache()) is None:
        raise ValueError("this user has no home directory: export XDG_CACHE_HOME=FOLDER, where shards and weights stay between runs")
    return users / "megakd"


def place() -> Path:
    return Path(os.environ.get(VARIABLE) or cache() / "bench-open_clip").absolute()


def ready() -> Environment | None:
    """The environment if it is there and works; nothing is built."""
    folder = place()
    versions = _probe(folder) if _is_current(folder) else None
    return None if versions is None else Environment(_python(folder), versions)


def set_up() -> Environment:
    """The environment, built on the first call: a minute and 60 MB from the package registry.

    A folder that $MEGAKD_BENCH_ENV names and that this program has not built is used as it is, never changed.
    Raises ValueError with the remedy when it cannot be built.
    """
    folder = place()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if (found := ready()) is not None:
            return found
        if folder.exists() and any(folder.iterdir()) and not (folder / STAMP).exists():
            raise ValueError(
                f"{folder}: this environment cannot import open_clip_train with its loader: `{_python(folder)} -m pip install "
                f"'open_clip_torch[training]'` there, or set {VARIABLE} to a folder that does not exist yet: it will be made"
            )
        print(f"setting up {folder} for open_clip's training program ({', '.join(REQUIREMENTS)}), once", flush=True)
        _build(folder)
    versions = _probe(folder, explain=True)
    assert versions is not None
    return Environment(_python(folder), versions)


def _build(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stamp = folder / STAMP  # written before anything else: what this program has begun, it may also remove
    stamp.write_text(json.dumps({**_wanted(), "complete": False}), encoding="utf-8")
    no_venv = "this python cannot make virtual environments; install its venv module (Debian: python3-venv)"
    _run([sys.executable, "-m", "venv", str(folder)], folder, no_venv)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "megakd-host.pth").write_text("".join(f"{path}\n" for path in _host_packages()), encoding="utf-8")
    quick = ["--quiet", "--disable-pip-version-check", "--retries", "2", "--timeout", "20"]
    no_index = "pip needs a package index: check the network, the proxy (PIP_PROXY) or the mirror (PIP_INDEX_URL)"
    _run([str(_python(folder)), "-m", "pip", "install", *quick, *REQUIREMENTS], folder, no_index)
    stamp.write_text(json.dumps({**_wanted(), "complete": True}), encoding="utf-8")


def _run(command: list[str], folder: Path, remedy: str) -> None:
    done = subprocess.run(command, env=environ(1), capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-6:])
        raise ValueError(
            f"the environment for open_clip's side cannot be set up in {folder}: {remedy}; or prepare one yourself, "
            f"with open_clip_torch[training] in it, and name its folder in {VARIABLE}.\n`{' '.join(command)}` said:\n  {said}"
        )


def _probe(folder: Path, explain: bool = False) -> dict[str, str] | None:
    """Versions of what the environment imports; None, or ValueError to `explain`, when it does not."""
    done = subprocess.run([str(_python(folder)), "-P", "-c", _PROBE], env=environ(1), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        versions: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return versions
    if explain:
        said = "\n  ".join(done.stderr.strip().splitlines()[-6:])
        raise ValueError(
            f"{folder} was set up, but open_clip's training program does not import there; report this, with its words:\n  {said}"
        )
    return None


def _is_current(folder: Path) -> bool:
    """Whether the folder was built for this python and these packages; a folder that somebody else built is judged by `_probe` alone."""
    if not _python(folder).exists():
        return False
    try:
        stamp: dict[str, Any] = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return stamp == {**_wanted(), "complete": True}


def _wanted() -> dict[str, Any]:
    return {"python": sys.version.split()[0], "packages": _host_packages(), "requirements": list(REQUIREMENTS)}


def _host_packages() -> list[str]:
    """Folders on this process's path that packages are installed in: more than one where a venv sees its system's packages."""
    return list(dict.fromkeys(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()))


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
