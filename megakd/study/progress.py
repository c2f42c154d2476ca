"""`megakd study --watch`: how far a study is that runs elsewhere, from the files that its runs write."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from megakd.recipe import texts
from megakd.runtime import locks
from megakd.runtime.console import plain
from megakd.runtime.run_folder import METRICS, read_metrics
from megakd.study import cluster
from megakd.study.results import DONE, FAILED, MISSING, RUNNING, STUDY, read_study
from megakd.study.run import load, spelled
from megakd.study.work import KINDS, Job, Work

SECONDS = 2.0
ASK_SLURM_SECONDS = 30.0  # between two looks at the queue, where the study runs as arrays
_SHOWN = 8  # running ones


def watch(source: str, out: Path | None, *, small: bool = False) -> int:
    """Show the study until all of its runs are done, or nothing runs any more; off a terminal once. Returns 0 when all are done."""
    _, _, work, folder = load(source, out, small=small)
    if not (folder / STUDY).is_file():
        raise ValueError(f"{folder}: no study has begun here; `megakd study {source}` starts it, --out says where it is")
    if seeds := _seeds(folder):  # `megakd smoke --seeds` runs others than the file's
        work = load(source, out, small=small, seeds=seeds)[2]
    console = Console()
    if not console.is_terminal:
        plain().print(view(work, folder))
    else:
        with Live(view(work, folder), console=console, auto_refresh=False) as live:
            asked, waits = time.monotonic(), True
            while waits and not all(job.done(folder) for job in work.jobs.values()):
                time.sleep(SECONDS)
                live.update(view(work, folder), refresh=True)
                if not locks.held(folder) and time.monotonic() - asked > ASK_SLURM_SECONDS:
                    asked, waits = time.monotonic(), bool(cluster.queued(folder))
    return 0 if all(job.done(folder) for job in work.jobs.values()) else 1


def _seeds(folder: Path) -> list[int]:
    """Those that the study in `folder` was started with."""
    return [int(seed) for seed in read_study(folder).axes["seed"] if seed.isdecimal()]


def view(work: Work, folder: Path) -> Table:
    """A row for each kind of run, then one for each that runs now."""
    table = Table(title=str(folder))
    for heading in ("runs", "done", "running", "failed", "to do", "each", "left"):
        table.add_column(heading, justify="left" if heading == "runs" else "right")
    running = [job for job in work.jobs.values() if _runs(job, folder)]
    rest, seconds = 0.0, work.seconds(folder)
    for kind in KINDS:
        jobs = [job for job in work.jobs.values() if job.kind == kind]
        if not jobs:
            continue
        states = Counter(RUNNING if job in running else job.state(folder)[0] for job in jobs)
        each = statistics.mean(seconds[kind]) if seconds[kind] else None
        open_runs = states[MISSING] + states[RUNNING]
        left = "" if each is None or not open_runs else spelled(each * open_runs / max(1, len(running)))
        rest += 0.0 if each is None else each * open_runs / max(1, len(running))
        counts = (str(states[name]) for name in (DONE, RUNNING, FAILED, MISSING))
        table.add_row(kind, *counts, "" if each is None else spelled(each), left)
    for job in running[:_SHOWN]:
        table.add_row(f"  {job.name}", "", _step(job, folder), "", "", "", "")
    table.caption = f"about {spelled(rest)} left" if rest else None
    return table


def _runs(job: Job, folder: Path) -> bool:
    return (folder / job.name).is_dir() and locks.held(folder / job.name) is True


def _step(job: Job, folder: Path) -> str:
    """How far a training is."""
    if not texts.exists(folder / job.name / METRICS):
        return "starting"
    steps = [row["step"] for row in read_metrics(folder / job.name) if "loss" in row]
    return f"{steps[-1] if steps else 0} of {job.recipe.optim.steps}"
