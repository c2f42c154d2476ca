"""A run is a folder: run.json, metrics.jsonl, checkpoints/, evaluation.json. This module writes the first two, and the console.

run.json    the resolved recipe and DeepSpeed configuration, command line, versions, commit: what it takes to replay the run; and
            `jobs`, one entry for each start of it, the newest last
metrics.jsonl    a row each `log.every` steps and one for each event; a resumed run drops the rows past its checkpoint
"""

from __future__ import annotations

import json
import math
import platform
import resource
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megakd.recipe import Recipe
from megakd.recipe.credentials import redact, redacted
from megakd.recipe.load import differences, load, refused, told
from megakd.runtime import environment
from megakd.runtime.files import write_text

RUN, METRICS, EVALUATION = "run.json", "metrics.jsonl", "evaluation.json"
# What a run folder holds when something was trained in it: checkpoints, or what was made of the last one.
TRAINED = ("checkpoints/step_*", "model", "bundle")
PACKAGES = ("megakd", "torch", "deepspeed", "open_clip_torch", "transformers", "triton")


class RunLog:
    """Writer of a run folder and of the console. Only the main rank writes; on others every method does nothing.

    failure: why a row or a line could not be written. It is only noted, and ends all ranks together at the next step, see `Trainer.step`.
    """

    def __init__(self, run: Path, *, main: bool) -> None:
        self.run, self._main = run, main
        self.failure: OSError | None = None
        self.console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """A line for people: on the console, not in the metrics."""
        if self._main:
            self._print(text)

    def _print(self, text: str) -> None:
        try:
            self.console.print(redact(text), markup=False)
        except OSError as error:  # where a job's output goes may be full as well
            self.failure = self.failure or OSError(error.errno, error.strerror, "standard output")

    def open(self, recipe: Recipe, ds_config: dict[str, Any], ranks: int) -> None:
        """Write run.json. A folder of another recipe has been refused before, see `check_resume`."""
        if not self._main:
            return
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        job = environment.slurm_record(ranks, started)
        content = {
            "recipe": recipe.model_dump(mode="json"),
            "ds_config": ds_config,
            "argv": sys.argv,
            "ranks": ranks,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
            "started": started,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "commit": commit(),
            "slurm_job_id": job["slurm_job_id"],
            "jobs": [*_earlier_jobs(self.run), job],
        }
        write_json(self.run / RUN, content)

    def keep_until(self, step: int) -> None:
        """Drop the metrics past `step`, which the resumed run writes again, and lines that are no rows, which is said."""
        path = self.run / METRICS
        if not self._main or not path.exists():
            return
        rows, damaged = _rows(path)
        if damaged:
            self.say(f"{path}: {damaged} damaged lines were dropped; what they said of the run is lost")
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))

    def row(self, row: dict[str, Any], total_steps: int) -> None:
        """One row of metrics.jsonl, and its line or progress bar on the console."""
        if not self._main:
            return
        self._append(row)
        if self.console.is_terminal:
            self._bar(row, total_steps)
        else:
            self._print(_line(row, total_steps))

    def event(self, step: int, name: str, content: Any) -> None:
        """A row that is no step: an evaluation, bad samples, a checkpoint."""
        if self._main:
            self._append({"step": step, "event": name, "content": content})

    def _append(self, row: dict[str, Any]) -> None:
        if self.failure is not None:
            return  # the last line may be half a row: nothing is written after it
        path = self.run / METRICS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(redacted(_finite(row))) + "\n")
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, str(path))

    def _bar(self, row: dict[str, Any], total_steps: int) -> None:
        if self._progress is None:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self.console)
            self._progress.start()
            self._progress.add_task("", total=total_steps)
        self._progress.update(self._progress.task_ids[0], completed=row["step"], description=_summary(row))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _earlier_jobs(run: Path) -> list[dict[str, Any]]:
    """`jobs` of the run.json that is there; of one by an earlier version of megakd, of a damaged one or of none, an empty list."""
    try:
        content = json.loads((run / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    jobs = content.get("jobs") if isinstance(content, dict) else None
    return [job for job in jobs if isinstance(job, dict)] if isinstance(jobs, list) else []


def check_resume(run: Path, resume: str, recipe: Recipe) -> None:
    """Raise ValueError when `--resume` names no checkpoint, or when `run` is the folder of another recipe.

    A folder without a checkpoint and a result is nobody's: a recipe that could not run starts there once it is corrected.
    """
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        raise ValueError(f"--resume {resume}: give auto, none, or the folder of a checkpoint (RUN/checkpoints/step_00000500)")
    path = run / RUN
    if resume == "none" or not path.exists():
        return
    try:
        earlier, _ = load(str(path), to_compare=True)
    except ValueError as error:
        raise ValueError(f"--out {run}: {error}\nchoose another --out, or --resume none to set that run aside") from error
    if (problems := refused(earlier, recipe)) and _trained(run):
        # what may change is named as well: with the others it is what makes this another recipe
        lines = problems + [line for line in differences(earlier, recipe) if not any(known.startswith(line) for known in problems)]
        shown = lines[:12] + [f"and {len(lines) - 12} more"] * (len(lines) > 12)
        raise ValueError(
            f"--out {run}: this folder belongs to a run of another recipe:\n  " + "\n  ".join(shown) + "\n"
            "choose another --out, or give the recipe that run was started with (RUN/run.json is one), "
            "or --resume none to set that run aside"
        )


def _trained(run: Path) -> bool:
    return any(next(run.glob(pattern), None) for pattern in TRAINED)


def changes(run: Path, recipe: Recipe) -> list[str]:
    """For people: what of the recipe is not as in the run's earlier starts, where something was trained and `check_resume` has passed."""
    if not _trained(run):
        return []
    if not (run / RUN).exists():
        return [f"{run / RUN} is missing: whether what is there was trained by this recipe cannot be checked"]
    return [f"the recipe has changed since this run began: {line}" for line in told(load(str(run / RUN), to_compare=True)[0], recipe)]


def archive(run: Path, entries: list[Path]) -> Path | None:
    """Move entries of a run's folder to RUN/previous/N, so that nothing is lost; None when there are none.

    run.json goes last: as long as anything of a run is there, so is what tells it from another recipe's, wherever a kill comes.
    """
    if not entries:
        return None
    earlier = [int(path.name) for path in (run / "previous").glob("*") if path.name.isdecimal()]
    target = run / "previous" / str(max(earlier, default=0) + 1)
    target.mkdir(parents=True)
    for entry in sorted(entries, key=lambda entry: (entry.name == RUN, entry.name)):
        entry.rename(target / entry.name)
    return target


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line cut by a crash, and what else is no row, is left out."""
    return _rows(run / METRICS)[0]


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of metrics.jsonl, and how many lines are none. A last line without its end, as a crash leaves it, is not counted."""
    rows: list[dict[str, Any]] = []
    damaged = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line, parse_constant=lambda _: None)  # NaN, as earlier versions wrote it
        except (ValueError, RecursionError):
            damaged += line.endswith(b"\n") and bool(line.strip())
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it. Credentials in URLs are left out."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(redacted(content), indent=1) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def commit() -> str | None:
    """Commit of the source tree this package runs from, with '+' for uncommitted changes; None outside a checkout or without git."""
    git = shutil.which("git")
    if git is None:
        return None
    here = [git, "-C", str(Path(__file__).parent)]
    found = subprocess.run([*here, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    changed = subprocess.run([*here, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    """null for NaN and infinity, which JSON does not have: a gradient norm may be one in a run's last row."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _summary(row: dict[str, Any]) -> str:
    parts = " ".join(f"{name} {value:.4f}" for name, value in row["losses"].items())
    return f"loss {row['loss']:.4f} ({parts}) | {row['images_per_second']:.0f} images/s | lr {row['lr']:.2e}"


def _line(row: dict[str, Any], total_steps: int) -> str:
    seconds = " ".join(f"{name} {value:.2f}" for name, value in row["seconds"].items())
    scale = f"scale {row['scale']:.2f} | " if "scale" in row else ""
    extra = f"{scale}norm {row['gradient_norm']:.3f} | {row['memory_gb']:.2f} GB | seconds: {seconds}"
    return f"step {row['step']}/{total_steps} | {_summary(row)} | {extra}"
