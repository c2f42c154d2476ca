"""`megakd study --cluster slurm`: the study's runs as job arrays, each of which starts when those before it have ended.

An array holds the runs that wait for equally many others: teachers; stores and students without KD; students; what reads them. A run whose
teacher has failed ends at once, and says so. Preempted and timed-out runs go back into the queue; of the others those that are not done at
the end are sent again by the same command.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import submitit

from megakd.jobs import Training, slurm
from megakd.jobs import submit as jobs
from megakd.jobs.resources import Resources
from megakd.jobs.submit import SubmitRequest
from megakd.recipe import texts
from megakd.runtime import files
from megakd.runtime.environment import SUBMISSIONS
from megakd.runtime.run_folder import write_json
from megakd.study import run as studies
from megakd.study import task
from megakd.study import work as works
from megakd.study.record import Record
from megakd.study.work import Job, Kind, Work

QUEUED = "arrays.json"


@dataclass(frozen=True)
class StudyTask:
    """A task of submitit: one run of a study on all ranks of its job, and a note of how it ended."""

    kind: Kind
    recipe: str
    out: str
    options: tuple[str, ...]
    note: str

    def __call__(self) -> int:
        """0 when the run has finished; raises its error otherwise, after the note. Does not return from a job that is requeued."""
        start = time.monotonic()
        try:
            self._run()
        except Exception as error:
            self._noted(1, str(error) or type(error).__name__, start)
            raise
        self._noted(0, "", start)
        return 0

    def _run(self) -> None:
        if self.kind in ("store", "scores"):
            task.perform(self.kind, self.recipe, Path(self.out), self.options)
        else:
            Training(("--recipe", self.recipe), self.out, "auto")()  # which submitit can requeue after a checkpoint

    def _noted(self, code: int, message: str, start: float) -> None:
        if submitit.JobEnvironment().global_rank == 0:
            write_json(Path(self.note), {"code": code, "message": message, "seconds": time.monotonic() - start, "tries": 1})

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What a requeued job runs."""
        return submitit.helpers.DelayedSubmission(self)


def submit(source: str, out: Path | None, wanted: Resources, *, small: bool = False, dry_run: bool = False) -> int:
    """Send what is not done. With `dry_run` print the batch file of one array instead. Returns 0.

    Raises ValueError for what is wrong with the study or the cluster's options, and while arrays of the study are still queued.
    """
    spec, grid, work, folder = studies.load(source, None if out is None else out.absolute(), small=small)
    folder = folder.absolute()
    left = levels(work, folder)
    if not left:
        print(f"{folder}: every run is done; `megakd report {folder}` makes the page")
        return 0
    training = next((job for jobs in left for job in jobs if job.kind not in ("store", "scores")), left[0][0])
    request = SubmitRequest(str(training.recipe_file(folder)), (), None, folder / training.name, "auto", folder.name)
    if dry_run:
        print(jobs.preview(folder, [request] * 2, wanted))
        for number, level in enumerate(left):
            print(f"array {number + 1}: {len(level)} runs, {', '.join(sorted({job.kind for job in level}))}")
        return 0
    _refuse_twice(folder)
    files.check_place(folder, "--out")
    record = Record(spec, grid, work, folder, source, studies.prepare(spec, grid))
    works.write(work, folder)
    record.write()
    jobs.check([request], wanted, "slurm", folder)
    slurm.check(wanted.partition, wanted.nodes, wanted.gpus_per_node)
    (folder / SUBMISSIONS).mkdir(parents=True, exist_ok=True)
    before: str | None = None
    sent: list[str] = []
    for number, level in enumerate(left):
        sender = jobs.executor(folder, folder.name, wanted, "slurm")
        if before is not None:
            sender.update_parameters(additional_parameters={"requeue": True, "dependency": f"afterany:{before}"})
        for job in level:
            job.note(folder).parent.mkdir(parents=True, exist_ok=True)
            job.note(folder).unlink(missing_ok=True)
        array = jobs.send(sender, [_task(job, folder) for job in level], folder / SUBMISSIONS)
        before = array[0].job_id.split("_")[0]
        sent += [one.job_id for one in array]
        write_json(folder / SUBMISSIONS / QUEUED, {"jobs": sent})
        print(f"array {number + 1}: {len(level)} runs as job {before}, {', '.join(sorted({job.kind for job in level}))}", flush=True)
    arrays = " ".join(dict.fromkeys(one.split("_")[0] for one in sent))
    print(f"`megakd study {source} --watch` shows how far it is; `scancel {arrays}` ends it")
    return 0


def levels(work: Work, folder: Path) -> list[list[Job]]:
    """What is not done, in groups of which each waits for those before it alone."""
    level: dict[str, int] = {}
    for name, job in work.jobs.items():
        if not job.done(folder):
            level[name] = 1 + max((level.get(before, -1) for before in job.after), default=-1)
    return [[work.jobs[name] for name, own in level.items() if own == number] for number in sorted(set(level.values()))]


def _task(job: Job, folder: Path) -> StudyTask:
    return StudyTask(job.kind, str(job.recipe_file(folder)), str(folder / job.name), job.options, str(job.note(folder)))


def queued(folder: Path) -> list[str]:
    """SLURM's numbers of the study's arrays that wait or run. Raises ValueError where squeue does not run."""
    path = folder / SUBMISSIONS / QUEUED
    if not path.is_file():
        return []
    sent = texts.read_json(path, str(path))
    known = slurm.states(sent.get("jobs", []) if isinstance(sent, dict) else [])
    return sorted({name.split("_")[0] for name, state in known.items() if not state.ended})


def _refuse_twice(folder: Path) -> None:
    """Raises ValueError while an array of this study waits or runs."""
    if running := queued(folder):
        raise ValueError(
            f"{folder}: {len(running)} arrays of this study are in the queue: wait for them (`megakd study ... --watch`), or end them: "
            f"scancel {' '.join(running)}"
        )
