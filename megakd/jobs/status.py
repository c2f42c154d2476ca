"""`megakd jobs`: every run below a folder, with what its job is doing, how far it is, and where its log lies."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from megakd.jobs import slurm as cluster
from megakd.runtime.console import plain
from megakd.runtime.environment import SUBMISSIONS
from megakd.runtime.locks import held
from megakd.runtime.run_folder import BEST, BUNDLE, METRICS, MODEL, RUN

RESULTS = (MODEL, BUNDLE)  # one is written at a run's end
INSIDE = {"checkpoints", *RESULTS, BEST, "previous", SUBMISSIONS, "answers", "hung"}  # folders of a run that hold no runs
TAIL = 65536  # bytes at the end of metrics.jsonl, whose rows are under 2 KB
LEAST_WATCH_SECONDS = 15.0  # between two tables, each of which asks SLURM once or twice
COLUMNS = ("run", "job", "state", "step", "images/s", "loss", "log")


@dataclass(frozen=True)
class RunStatus:
    """A run by the files in its folder.

    job: SLURM's id of its newest job; local: submitit's, where it runs without SLURM; begun: when that job started here last; held: whether
    a process holds its lock, None on a file system without locks; damaged: why run.json could not be read.
    """

    folder: Path
    job: str | None
    local: str | None
    log: str | None
    step: int
    steps: int | None
    images_per_second: float | None
    loss: float | None
    begun: datetime | None
    held: bool | None
    results: bool
    damaged: str | None


def find(folder: Path) -> list[RunStatus]:
    """All runs in and below `folder`, by path: with a run.json, or submitted and not started."""
    return [_read(run) for run in sorted(_folders(folder))]


def _folders(folder: Path) -> Iterator[Path]:
    for here, inner, files in os.walk(folder):
        run = Path(here)
        if RUN in files or _submissions(run):
            yield run
        inner[:] = [name for name in inner if name not in INSIDE]


def _submissions(run: Path) -> list[dict[str, Any]]:
    """What `megakd submit` noted about each of the run's jobs, the oldest first."""
    notes = [note for path in (run / SUBMISSIONS).glob("*.json") if isinstance(note := _json(path), dict) and "job" in note]
    return sorted(notes, key=lambda note: str(note.get("submitted")))


def _read(run: Path) -> RunStatus:
    content = _json(run / RUN) if (run / RUN).exists() else {}
    damaged = None if isinstance(content, dict) else str(content)
    about: dict[str, Any] = content if isinstance(content, dict) else {}
    jobs = about.get("jobs")
    starts = [start for start in jobs if isinstance(start, dict)] if isinstance(jobs, list) else []
    sent = _submissions(run)
    newest, log = _newest(sent, starts)
    # a start records SLURM's jobs alone; by its log it is known of which submission it is
    local = next((str(note["job"]) for note in reversed(sent) if newest is None and log and note.get("log") == log), None)
    row = _last_row(run / METRICS)
    speed, loss = (value if isinstance(value := row.get(name), int | float) else None for name in ("images_per_second", "loss"))
    settings = about.get("recipe")
    optim = settings.get("optim") if isinstance(settings, dict) else None
    return RunStatus(
        folder=run,
        job=newest,
        local=local,
        log=log,
        step=row.get("step", 0),
        steps=optim.get("steps") if isinstance(optim, dict) else None,
        images_per_second=speed,
        loss=loss,
        begun=_last_start(starts, newest),
        held=held(run),
        results=any((run / name).exists() for name in RESULTS),
        damaged=damaged,
    )


def _newest(submissions: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """SLURM's id (None outside SLURM) and the log of the last submission or start."""
    sent = [(str(note.get("submitted")), note["job"] if note.get("cluster") == "slurm" else None, note.get("log")) for note in submissions]
    begun = [(str(start.get("started")), start.get("slurm_job_id"), start.get("log")) for start in starts]
    _, job, log = max([*sent, *begun], key=lambda entry: entry[0], default=("", None, None))
    return job, log


def _last_start(starts: Sequence[Mapping[str, Any]], job: str | None) -> datetime | None:
    try:
        return max((datetime.fromisoformat(start["started"]) for start in starts if job and start.get("slurm_job_id") == job), default=None)
    except (KeyError, TypeError, ValueError):  # of an earlier version, or written by hand
        return None


def _json(path: Path) -> Any:
    """The file's content, or a string with the error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{path.name}: {error}"


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a step; empty before there is one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut by the seek, or by a crash
            continue
        if isinstance(row, dict) and "loss" in row:
            return row
    return {}


def state(run: RunStatus, slurm: Mapping[str, cluster.JobState]) -> str:
    """SLURM's state of the run's newest job; without one, or where it runs on after this run: running, finished or stopped."""
    if run.damaged is not None:
        return f"damaged: {run.damaged}"
    job = slurm.get(run.job) if run.job else None
    over = job is not None and job.name == "RUNNING" and run.held is False and _began_after(run, job.since)
    if job is not None and not over:
        back = job.name in ("PREEMPTED", "REQUEUED") or (job.name == "PENDING" and run.begun is not None)
        name = "PENDING again" if back else job.name
        return f"{name} ({job.reason})" if job.reason and not job.ended else name
    if run.held:
        return "running"
    return "finished" if run.results else "stopped"


def _began_after(run: RunStatus, since: str) -> bool:
    """Whether the run has started since its job did, which takes a requeued one a while."""
    try:
        return run.begun is not None and run.begun >= datetime.fromisoformat(since).astimezone()
    except ValueError:  # N/A
        return False


def table(runs: Sequence[RunStatus], slurm: Mapping[str, cluster.JobState]) -> Table:
    """One row a run; nothing is cut off."""
    shown = Table(*COLUMNS, box=None, pad_edge=False)
    for column in shown.columns:
        column.overflow = "fold"
    for run in runs:
        speed = "-" if run.images_per_second is None else f"{run.images_per_second:.0f}"
        loss = "-" if run.loss is None else f"{run.loss:.4f}"
        step = f"{run.step}/{run.steps or '-'}"
        shown.add_row(
            str(run.folder), run.job or (f"local:{run.local}" if run.local else "-"), state(run, slurm), step, speed, loss, run.log or "-"
        )
    return shown


def show(folder: Path, watch: float | None) -> None:
    """Print the table, every `watch` seconds if given. Raises ValueError when that is too often for SLURM."""
    if watch is not None and watch < LEAST_WATCH_SECONDS:
        raise ValueError(f"--watch {watch:g}: give {LEAST_WATCH_SECONDS:.0f} seconds or more; every table asks SLURM's controller")
    console = plain()
    ended = dict[str, cluster.JobState]()
    while True:
        runs = find(folder)
        if not runs:
            console.print(f"no runs in {folder}: `megakd submit --out {folder}/NAME` and megakd/train.py make some")
        else:
            slurm, problem = _slurm(runs, ended)
            console.print(table(runs, slurm))
            if problem:
                console.print(f"the states above are from the folders alone: {problem}")
        if watch is None:
            return
        time.sleep(watch)


def _slurm(runs: Sequence[RunStatus], ended: dict[str, cluster.JobState]) -> tuple[dict[str, cluster.JobState], str | None]:
    """States of the runs' jobs, and why there are none where SLURM does not answer.

    ended: states of earlier tables, kept here. SLURM is asked neither about those nor about runs that their newest job has finished.
    """
    for run in runs:
        if run.job and run.held:
            ended.pop(run.job, None)  # it was requeued by hand
    unfinished = [run for run in runs if not (run.results and run.begun is not None and run.held is False)]
    try:
        known = cluster.states(run.job for run in unfinished if run.job and run.job not in ended)
    except ValueError as error:
        return dict(ended), str(error)
    ended |= {job: job_state for job, job_state in known.items() if job_state.ended}
    return ended | known, None
