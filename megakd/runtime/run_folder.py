"""A run is a folder: run.json, metrics.jsonl, checkpoints/, evaluation.json. This module writes and reads the first two.

run.json         the resolved recipe and DeepSpeed configuration, command line, versions, commit: what replays the run; `student_start`,
                 where the student's first weights came from; `jobs`, an entry for each start, the newest last, with how it ended
metrics.jsonl    a row each `log.every` steps and one for each event; a resumed run drops the rows past its checkpoint
profile/         with `log.profile`: trace.json.gz and operators.txt of the last start's first steps
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from megakd.recipe import Recipe
from megakd.recipe.credentials import redacted
from megakd.recipe.load import differences, load, refused, told
from megakd.recipe.objectives import with_heads_of
from megakd.runtime import environment
from megakd.runtime.console import RunConsole
from megakd.runtime.files import write_text

RUN, METRICS, EVALUATION = "run.json", "metrics.jsonl", "evaluation.json"
START = "student_start"  # in run.json: by part of the student how many of its tensors came from where, and which are new
REST = "the rest"  # of the student in it, beside its towers
MODEL, BUNDLE = "model", "bundle"  # a run's results: the student as open_clip's folder, the decoder as a bundle
PROFILE = "profile"
BEST = "best"  # a folder with the same, made of the best evaluation's weights
# What a run folder holds when something was trained in it.
TRAINED = ("checkpoints/step_*", MODEL, BUNDLE)
FINISHED, SAVED, FAILED = "finished", "saved", "failed"  # how a start ended; SAVED: after a signal
_TIME = "%Y-%m-%dT%H:%M:%S%z"
PACKAGES = ("megakd", "torch", "deepspeed", "open_clip_torch", "transformers", "triton")


class RunLog:
    """Writer of a run folder and of the run's console; on other ranks than the main one every method does nothing.

    failure: why a row or a line could not be written. It ends all ranks together at the next step, see `Trainer.step`.
    """

    def __init__(self, run: Path, *, main: bool) -> None:
        self.run, self._main = run, main
        self._console = RunConsole()
        self._unwritten: OSError | None = None  # a row
        self._opened: dict[str, Any] = {}  # what this start has written to run.json

    @property
    def failure(self) -> OSError | None:
        return self._unwritten or self._console.failure

    def say(self, text: str) -> None:
        """A line on the console."""
        if self._main:
            self._console.say(text)

    def open(self, recipe: Recipe, ds_config: dict[str, Any], ranks: int, step: int = 0) -> None:
        """Write run.json. `check_resume` has refused a folder of another recipe before. step: where this start goes on."""
        if not self._main:
            return
        started = time.strftime(_TIME)
        job = environment.slurm_record(ranks, started)
        content = {
            "recipe": recipe.model_dump(mode="json"),
            "ds_config": ds_config,
            "argv": sys.argv,
            "ranks": ranks,
            "device": environment.device_name(),
            "started": started,
            "versions": environment.versions(PACKAGES),
            "commit": environment.commit(),
            "slurm_job_id": job["slurm_job_id"],
            "jobs": [*_earlier_jobs(self.run), {**job, "from_step": step}],
        }
        if step and (begun := _earlier(self.run).get(START)) is not None:
            content[START] = begun
        write_json(self.run / RUN, content)
        self._opened = content

    def begins_with(self, record: dict[str, Any], lines: list[str]) -> None:
        """Say what the student begins with, and note it in run.json; a start that goes on from a checkpoint keeps what is noted."""
        self.say("\n".join(lines))
        if self._opened and not self._opened["jobs"][-1]["from_step"]:
            self._opened[START] = record
            write_json(self.run / RUN, self._opened)

    def has_compiled(self, record: dict[str, Any]) -> None:
        """Say in how many seconds the first step of this start compiled the towers' blocks, and note in run.json what they are."""
        self.say(f"compiled in {record['seconds']:.0f} s, which images/s does not count: {', '.join(record['what'])}")
        if self._opened:
            self._opened["jobs"][-1]["compiled"] = record
            write_json(self.run / RUN, self._opened)

    def ended(self, how: str, words: str = "") -> None:
        """Note in run.json how this start ended: FINISHED, SAVED or FAILED, with its last words.

        A disk without room and a folder that is gone are left to what the console says.
        """
        if self._opened and (self.run / RUN).exists():
            self._opened["jobs"][-1]["ended"] = {"time": time.strftime(_TIME), "how": how, "words": words}
            with contextlib.suppress(OSError):
                write_json(self.run / RUN, self._opened)

    def keep_until(self, step: int) -> None:
        """Drop the metrics past `step`, which the resumed run writes again, and damaged lines, which is said."""
        path = self.run / METRICS
        if not self._main or not path.exists():
            return
        rows, damaged = _rows(path)
        if damaged:
            self.say(f"{path}: {damaged} damaged lines were dropped; what they said of the run is lost")
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))

    def row(self, row: dict[str, Any], total_steps: int) -> None:
        """One row of metrics.jsonl, and its line or progress bar on the console."""
        if self._main:
            self._append(row)
            self._console.step(row, total_steps)

    def event(self, step: int, name: str, content: Any) -> None:
        """A row that is no step: an evaluation, bad samples, a checkpoint."""
        if self._main:
            self._append({"step": step, "event": name, "content": content})

    def _append(self, row: dict[str, Any]) -> None:
        if self._unwritten is not None:
            return  # the last line may be half a row
        path = self.run / METRICS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(redacted(_finite(row))) + "\n")
        except OSError as error:
            self._unwritten = OSError(error.errno, error.strerror, str(path))

    def close(self) -> None:
        self._console.close()


def _earlier(run: Path) -> dict[str, Any]:
    """The run.json that is there; empty for a damaged one, or none."""
    try:
        content = json.loads((run / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _earlier_jobs(run: Path) -> list[dict[str, Any]]:
    """`jobs` of the run.json that is there; empty for an earlier version's, a damaged one, or none."""
    jobs = _earlier(run).get("jobs")
    return [job for job in jobs if isinstance(job, dict)] if isinstance(jobs, list) else []


def check_resume(run: Path, resume: str, recipe: Recipe) -> Recipe:
    """The recipe that goes on: with the heads that the run has where `recipe` leaves their kind to "auto".

    Raises ValueError when `--resume` names no checkpoint, or when something was trained in `run` by another recipe.
    """
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        raise ValueError(f"--resume {resume}: give auto, none, or the folder of a checkpoint (RUN/checkpoints/step_00000500)")
    path = run / RUN
    if resume not in ("auto", "none"):  # perhaps of another run, whose weights decide what fits where its run.json cannot be read
        with contextlib.suppress(ValueError):
            recipe = with_heads_of(load(str(Path(resume).absolute().parent.parent / RUN), to_compare=True)[0], recipe)
    if resume == "none" or not path.exists():
        return recipe
    try:
        earlier, _ = load(str(path), to_compare=True)
    except ValueError as error:
        raise ValueError(f"--out {run}: {error}\nchoose another --out, or --resume none to set that run aside") from error
    if _trained(run):
        recipe = with_heads_of(earlier, recipe)
    if (problems := refused(earlier, recipe)) and _trained(run):
        # with what may change, as that makes it another recipe as well
        lines = problems + [line for line in differences(earlier, recipe) if not any(known.startswith(line) for known in problems)]
        shown = lines[:12] + [f"and {len(lines) - 12} more"] * (len(lines) > 12)
        raise ValueError(
            f"--out {run}: this folder belongs to a run of another recipe:\n  " + "\n  ".join(shown) + "\n"
            "choose another --out, or give the recipe that run was started with (RUN/run.json is one), "
            "or --resume none to set that run aside"
        )
    return recipe


def _trained(run: Path) -> bool:
    return any(next(run.glob(pattern), None) for pattern in TRAINED)


def changes(run: Path, recipe: Recipe) -> list[str]:
    """For people: how the recipe differs from the run's earlier starts, where something was trained and `check_resume` has passed."""
    if not _trained(run):
        return []
    if not (run / RUN).exists():
        return [f"{run / RUN} is missing: whether what is there was trained by this recipe cannot be checked"]
    return [f"the recipe has changed since this run began: {line}" for line in told(load(str(run / RUN), to_compare=True)[0], recipe)]


def archive(run: Path, entries: list[Path]) -> Path | None:
    """Move entries of a run's folder to RUN/previous/N; None when there are none.

    run.json goes last, so that after a kill what is left of a run is still known by its recipe.
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
    """All rows, without damaged lines and a last one that a crash cut."""
    return _rows(run / METRICS)[0]


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(rows of metrics.jsonl, number of damaged lines); a last line that a crash cut is not counted."""
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
    """Write JSON without credentials; a reader sees the old file or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(redacted(content), indent=1) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _finite(value: Any) -> Any:
    """null for NaN and infinity, which JSON does not have: a gradient norm may be one in a run's last row."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
