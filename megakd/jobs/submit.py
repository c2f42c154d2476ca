"""`megakd submit`: check on the login node what can be checked there, hand the run to submitit, and wait for it if wanted.

A run folder and its jobs name each other: RUN/slurm/JOB.json is written at submission, SLURM's comment is the run folder, and run.json
lists its jobs. submitit's files and the logs are in RUN/slurm; those of an array in the sweep's folder.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import submitit
import torch
from submitit.core.utils import FailedJobError, FailedSubmissionError

from megakd.jobs import batch_words, slurm
from megakd.jobs.resources import Resources
from megakd.jobs.task import Training
from megakd.recipe import load as recipes
from megakd.runtime import ds_check, ds_config, precision, run_folder
from megakd.runtime.environment import LOG_VARIABLE, SUBMISSIONS
from megakd.runtime.launch import TORCH_VARIABLES

# Time limits, and for jobs of up to ten minutes interruptions, after which submitit gives up: a week on a partition of one hour has 168.
MAX_TIMEOUTS = 1000
POLL_SECONDS, SLURM_POLL_SECONDS = 2.0, 30.0  # for result files, and for SLURM's states
LONGEST_NAME = 255
RESULT_SECONDS = 20.0  # of a result over a shared file system after a job's end
Where = Literal["slurm", "local", "debug"]
# Options without a meaning there, which are refused.
NOT_LOCAL = ("cpus_per_task", "mem", "partition", "constraint", "account", "qos", "container_image", "container_mounts")
UNUSED: dict[Where, tuple[str, ...]] = {
    "slurm": (),
    "local": NOT_LOCAL,
    "debug": (*NOT_LOCAL, "gpus_per_node", "tasks_per_node", "time", "signal_delay", "setup", "python"),
}


@dataclass(frozen=True)
class SubmitRequest:
    """A run as `megakd submit` was asked for it."""

    recipe: str
    overrides: tuple[str, ...]
    ds_config: str | None
    out: Path
    resume: str
    name: str

    @property
    def training(self) -> Training:
        arguments = ["--recipe", self.recipe, *itertools.chain.from_iterable(("--set", override) for override in self.overrides)]
        return Training((*arguments, *(("--ds_config", self.ds_config) if self.ds_config else ())), str(self.out), self.resume)


def requests(
    recipe: str, overrides: Sequence[str], config: str | None, out: Path | None, resume: str, array: Sequence[str]
) -> tuple[Path, list[SubmitRequest]]:
    """The folder of the job and a request for each run: several where `array` varies keys, each in a folder below the job's."""
    loaded, _ = recipes.load(recipe, overrides)
    top = (out or Path("runs") / loaded.name).absolute()
    first = SubmitRequest(recipe, tuple(overrides), config, top, resume, loaded.name)
    if not array:
        return top, [first]
    varied = []
    for text in array:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"--array {text}: write KEY=VALUE,VALUE for example --array seed=0,1,2")
        # not at a comma inside of a list, a table or a shard pattern's braces
        varied.append([f"{key}={value}" for value in re.split(r",(?![^\[{]*[\]}])", values)])
    runs: list[SubmitRequest] = []
    for combination in itertools.product(*varied):
        folder = top / ",".join(combination).replace("/", "_")
        if len(os.fsencode(folder.name)) > LONGEST_NAME:
            raise ValueError(
                f"--array {' '.join(array)[:200]}: a run's folder is named by its values, and {folder.name[:60]}... is longer than "
                f"{LONGEST_NAME} bytes; give each recipe a name, or submit the runs one by one with --out"
            )
        if folder in (run.out for run in runs):
            raise ValueError(f"--array {' '.join(array)[:200]}: two runs would share the folder {folder}; give each value once")
        runs.append(replace(first, overrides=(*first.overrides, *combination), out=folder))
    return top, runs


def check(runs: Sequence[SubmitRequest], wanted: Resources, where: Where, top: Path) -> None:
    """Raise ValueError for what can be known to be wrong before the job queues."""
    if idle := [field.name for field in fields(wanted) if field.name in UNUSED[where] and getattr(wanted, field.name) != field.default]:
        raise ValueError(f"--{idle[0]}: not used by --cluster {where}; leave it out")
    if wanted.container_mounts and not wanted.container_image:
        raise ValueError(f"--container_mounts {wanted.container_mounts}: there is no --container_image")
    batch_words.check(wanted, top if where == "slurm" else None, Path.cwd())
    ranks = wanted.nodes * wanted.ranks_per_node
    raw, config_name = ds_config.read(runs[0].ds_config, precision.of(torch.device("cuda" if wanted.gpus_per_node else "cpu")))
    for run in runs:
        recipe, origin = recipes.load(run.recipe, run.overrides)
        ds_check.check(ds_config.resolve(raw, recipe, ranks, config_name=config_name, recipe_name=origin), config_name)
        run_folder.check_resume(run.out, run.resume, recipe)
    if wanted.gpus_per_node and wanted.ranks_per_node > wanted.gpus_per_node:
        raise ValueError(f"--tasks_per_node {wanted.tasks_per_node}: more ranks than --gpus_per_node {wanted.gpus_per_node}")
    if where != "slurm" and wanted.nodes > 1:
        raise ValueError(f"--nodes {wanted.nodes}: --cluster {where} is this machine alone")
    if where == "local" and len(runs) > 1:
        raise ValueError("--array: on --cluster slurm alone; here one run after another, with --set")


class _Unsent(submitit.SlurmExecutor):
    """For a batch file that is only shown, without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def executor(
    top: Path, name: str, wanted: Resources, where: Where, slurm_executor: type[submitit.SlurmExecutor] = submitit.SlurmExecutor
) -> submitit.core.core.PicklingExecutor:
    """submitit's executor with everything set; only a local one has touched the disk."""
    folder = top / SUBMISSIONS
    container = wanted.container_image is not None
    python = wanted.python or ("python" if container else None)
    interpreter = None if python is None else shlex.quote(python)  # a word of the batch script's command line
    devices = {"gpus_per_node": wanted.gpus_per_node} if wanted.gpus_per_node else {}
    if where == "local":
        local = submitit.LocalExecutor(folder, max_num_timeout=MAX_TIMEOUTS, python=interpreter)
        local.update_parameters(
            tasks_per_node=wanted.ranks_per_node,
            timeout_min=wanted.minutes,
            signal_delay_s=wanted.signal_delay,
            setup=list(wanted.setup),
            **devices,
        )
        return local
    slurm = slurm_executor(folder, max_num_timeout=MAX_TIMEOUTS, python=interpreter)
    optional = {key: getattr(wanted, key) for key in ("cpus_per_task", "mem", "partition", "constraint", "account", "qos")}
    requeue = Path(__file__).with_name("requeue.sh").read_text(encoding="utf-8")
    slurm.update_parameters(
        job_name=name,
        nodes=wanted.nodes,
        ntasks_per_node=wanted.ranks_per_node,
        time=wanted.minutes,
        signal_delay_s=wanted.signal_delay,
        comment=str(top),
        setup=_setup(wanted),
        teardown=["code=$?", requeue, 'finish "$code" "the same megakd submit command"'],
        srun_args=["--kill-on-bad-exit=1", *(_container(top, wanted) if container else ())],
        additional_parameters={"requeue": True},
        **devices,
        **{key: value for key, value in optional.items() if value is not None},
    )
    return slurm


def _setup(wanted: Resources) -> list[str]:
    lines = [
        "export SLURM_EXPORT_ENV=ALL  # also where sbatch was called with --export=NONE",
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"',
        f"unset {LOG_VARIABLE} {' '.join(TORCH_VARIABLES)} LOCAL_WORLD_SIZE  # of a shell under torchrun, or in another job",
    ]
    if wanted.cpus_per_task is not None:
        # since SLURM 22.05 srun does not take it from the job, and up to 23.02 it reads it under this name
        lines.append(f"export SRUN_CPUS_PER_TASK={wanted.cpus_per_task}")
    return [*lines, *wanted.setup, "set +e  # srun's exit code is looked at below"]


def _container(top: Path, wanted: Resources) -> list[str]:
    """pyxis's options of srun. The current folder and the run's are mounted where they are; data by --container_mounts."""
    mounts = dict.fromkeys([f"{Path.cwd()}:{Path.cwd()}", f"{top}:{top}", *(wanted.container_mounts or "").split(",")])
    return [
        f"--container-image={wanted.container_image}",
        f"--container-mounts={','.join(mount for mount in mounts if mount)}",
        f"--container-workdir={Path.cwd()}",
    ]


def preview(top: Path, runs: Sequence[SubmitRequest], wanted: Resources) -> str:
    """The batch file as submitit would send it."""
    sender = executor(top, runs[0].name, wanted, "slurm", _Unsent)
    if len(runs) > 1:
        sender.parameters["map_count"] = len(runs)
    return sender._make_submission_file_text(sender._submitit_command_str, "")


def submit(top: Path, runs: Sequence[SubmitRequest], wanted: Resources, where: Where) -> list[submitit.Job[int]]:
    """Hand the runs to submitit, several as one array. Raises ValueError with sbatch's message, and leaves no file of a refused job."""
    folder = top / SUBMISSIONS
    try:
        for run in runs:
            (run.out / SUBMISSIONS).mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {top}: the folder for the logs cannot be made ({error}); choose another --out") from None
    sent = send(executor(top, runs[0].name, wanted, where), [run.training for run in runs], folder)
    for run, job in zip(runs, sent, strict=True):
        record = {
            "job": job.job_id,
            "cluster": where,
            "run": str(run.out),
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join(sys.argv),
            "log": str(job.task(0).paths.stdout),
        }
        run_folder.write_json(run.out / SUBMISSIONS / f"{job.job_id}.json", record)
    return sent


def send(sender: submitit.core.core.PicklingExecutor, tasks: Sequence[Callable[[], int]], folder: Path) -> list[submitit.Job[int]]:
    """Submit the tasks, several as one array. folder: of submitit's files. Raises as `submit` does."""
    before = set(folder.iterdir())
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # sbatch's message, which the error below carries
            return sender.submit_array(list(tasks))
    except (FailedJobError, FailedSubmissionError) as error:
        for leftover in set(folder.iterdir()) - before:
            leftover.unlink()
        raise ValueError(f"sbatch refuses the job:\n{error}\nthe cluster has\n{slurm.listing(slurm.partitions())}") from None


def wait(jobs: Sequence[submitit.Job[int]], where: Where) -> int:
    """The exit code of the first run that failed, 0 when all finished; prints how each one ended.

    Looks for submitit's result files, and asks SLURM every half minute about all jobs, as a cancelled one leaves no file.
    """
    codes: dict[str, int] = {}
    last_asked, ended = time.monotonic(), dict[str, tuple[float, slurm.JobState]]()
    while len(codes) < len(jobs):
        open_jobs = [job for job in jobs if job.job_id not in codes]
        if where == "slurm" and time.monotonic() - last_asked >= SLURM_POLL_SECONDS:
            last_asked = time.monotonic()
            try:
                states = slurm.states(job.job_id for job in open_jobs)
            except ValueError as error:  # a controller that is busy or restarts is no end of the jobs
                print(f"asking again later: {error}", file=sys.stderr, flush=True)
            else:
                ended = {id: ended.get(id, (last_asked, state)) for id, state in states.items() if state.ended}
        for job in open_jobs:
            code = _result(job)
            if code is None and job.job_id in ended and time.monotonic() - ended[job.job_id][0] >= RESULT_SECONDS:
                code = _no_result(job, ended[job.job_id][1])
            if code is None and where == "local" and job.state != "RUNNING" and _result(job) is None:
                code = _no_result(job, slurm.JobState(job.state))
            if code is not None:
                codes[job.job_id] = code
        time.sleep(POLL_SECONDS if len(codes) < len(jobs) else 0)
    return next((code for code in codes.values() if code), 0)


def _result(job: submitit.Job[int]) -> int | None:
    """Exit code of a job when all tasks have succeeded or one has failed; None before."""
    tasks = [job.task(number) for number in range(job.num_tasks)]
    ended = sorted((task for task in tasks if task.paths.result_pickle.exists()), key=lambda task: task.paths.result_pickle.stat().st_mtime)
    for task in ended:  # the first to fail has the cause, the others the consequence
        if (error := task.exception()) is not None:
            # a run's own message without the frames around it, any other error with its traceback
            own = re.search(r"megakd\.jobs(?:\.task)?\.RunFailed: (.*?\nexit code: (\d+))", str(error), re.DOTALL)
            print(f"job {job.job_id} failed: {own[1] if own else error}", file=sys.stderr, flush=True)
            return int(own[2]) if own else 1
    if len(ended) < len(tasks):
        return None
    print(f"job {job.job_id} finished, log: {tasks[0].paths.stdout}", flush=True)
    return 0


def _no_result(job: submitit.Job[int], state: slurm.JobState) -> int:
    log = job.task(0).paths.stderr
    print(f"job {job.job_id} ended as {state.name} without a result, log: {log}", file=sys.stderr, flush=True)
    return state.code or 1


def run(top: Path, runs: Sequence[SubmitRequest], wanted: Resources, where: Where, *, follow: bool, dry_run: bool) -> int:
    """Submit, run, or with `dry_run` print. Returns the exit code."""
    check(runs, wanted, where, top)
    if dry_run:
        _print_plan(top, runs, wanted, where)
        return 0
    if where == "slurm":
        slurm.check(wanted.partition, wanted.nodes, wanted.gpus_per_node)
    if where == "debug":
        from megakd.training.command import run_command

        # in this process, up to the first that fails
        return next((code for request in runs if (code := run_command(_arguments(request)))), 0)
    jobs = submit(top, runs, wanted, where)
    for request, job in zip(runs, jobs, strict=True):
        print(f"job {job.job_id}: run folder {request.out}, log {job.task(0).paths.stdout}", flush=True)
    if follow:
        return wait(jobs, where)
    print("`megakd jobs` shows where they are" + (f"; `scancel {jobs[0].job_id.split('_')[0]}` ends them" if where == "slurm" else ""))
    return 0


def _print_plan(top: Path, runs: Sequence[SubmitRequest], wanted: Resources, where: Where) -> None:
    """Print what would be sent or run, and what could not be checked here."""
    if where != "slurm":
        ranks = f"  # {wanted.ranks_per_node} ranks, by submitit" if wanted.ranks_per_node > 1 else ""
        commands = [shlex.join(["python", "megakd/train.py", *_arguments(request)]) + ranks for request in runs]
        print("\n".join([*wanted.setup, *commands]))
        return
    print(preview(top, runs, wanted))
    try:
        there = slurm.partitions()
    except ValueError as error:
        print(f"not checked: partition, nodes and GPUs ({error})", file=sys.stderr)
    else:
        slurm.check(wanted.partition, wanted.nodes, wanted.gpus_per_node, there)


def _arguments(request: SubmitRequest) -> list[str]:
    """Of megakd/train.py."""
    training = request.training
    return [*training.arguments, "--out", training.out, "--resume", training.resume]
