"""Where a run runs, for run.json and the console: its SLURM job, machines and log, the device, versions and commit."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

# Scripts and `megakd submit` name the job's log here; else `scontrol` is asked, once a start.
LOG_VARIABLE = "MEGAKD_LOG"
# What `megakd submit` keeps in a run folder: what it sent and the logs.
SUBMISSIONS = "slurm"
SCONTROL_SECONDS = 10.0


def job_id(environ: Mapping[str, str]) -> str | None:
    """As squeue shows it, 4711 or for a task of an array 4711_3; None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def restarts(environ: Mapping[str, str]) -> int:
    """How often SLURM started this job again; 0 outside SLURM."""
    return int(environ.get("SLURM_RESTART_COUNT", "0"))


def has_come_back(environ: Mapping[str, str], starts: Iterable[Any]) -> bool:
    """Whether an earlier start of this job, before it was requeued, is among a run's `starts` (`jobs` in run.json)."""
    known = [start for start in starts if isinstance(start, dict) and start.get("slurm_job_id") == job_id(environ)]
    return restarts(environ) > 0 and any(start.get("restarts", 0) != restarts(environ) for start in known)


def slurm_record(ranks: int, started: str) -> dict[str, Any]:
    """One start of a run: an entry of `jobs` in run.json. Asks `scontrol` for the log where the environment does not name it."""
    environ = os.environ
    return {
        "slurm_job_id": job_id(environ),
        "restarts": restarts(environ),
        "nodes": environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or socket.gethostname(),
        "ranks": ranks,
        "started": started,
        "log": log_path(environ),
    }


def log_path(environ: Mapping[str, str]) -> str | None:
    """Absolute path of this job's output; None where it is not known, outside SLURM or in an interactive job."""
    if environ.get(LOG_VARIABLE):
        return str(Path(environ[LOG_VARIABLE]).absolute())
    if "SLURM_JOB_ID" not in environ:
        return None
    command = ["scontrol", "show", "job", environ["SLURM_JOB_ID"]]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SCONTROL_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"^\s*StdOut=(.+)$", shown.stdout, re.MULTILINE)
    return match[1] if match else None


def device_name() -> str:
    """The GPU that this process computes on, or the machine's processor."""
    import torch  # not at the module's level, see `jobs/task.py`

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of python and of these packages; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the source tree this package runs from, with '+' for uncommitted changes; None outside a checkout or without git."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
