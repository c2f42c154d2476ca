"""One run of a study, in a process of its own that writes to the run's log.

On a CPU the processes are forked from one that has loaded the libraries, which takes a run ten seconds by itself. CUDA cannot be used in a
process that was forked after it was asked for devices, so that there each loads them again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path

from megakd.models import image_only
from megakd.recipe import Teacher
from megakd.recipe.credentials import redact
from megakd.recipe.load import load_recipe
from megakd.runtime import failures
from megakd.runtime.exits import EXIT_USER_ERROR
from megakd.runtime.preemption import ignore_from_here, note_early
from megakd.runtime.run_folder import EVALUATION
from megakd.teachers.embed_request import EmbedRequest

PRELOADED = ("megakd.training.command", "megakd.study.task")


def processes(cuda: bool) -> BaseContext:
    """How this machine's runs are started."""
    if cuda:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def main(kind: str, recipe: str, out: str, options: tuple[str, ...], log: str, variables: dict[str, str]) -> None:
    """The process: ends with the run's exit code, or with the study that started it, then after a checkpoint."""
    note_early()
    os.environ.update(variables)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 (until the process ends)
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    try:
        code = perform(kind, recipe, Path(out), options)
    except Exception as error:
        explained = failures.explain(error)
        if explained is None:
            raise
        print(f"error: {redact(explained)}", file=sys.stderr)
        code = EXIT_USER_ERROR
    ignore_from_here()
    sys.exit(code)


def perform(kind: str, recipe: str, out: Path, options: tuple[str, ...]) -> int:
    """Train, embed or score by the recipe in the file, in this process. Returns the exit code; raises for what a store or a score lacks."""
    if kind == "store":
        from megakd.teachers import embed

        views, dtype = options
        embed.run(recipe, EmbedRequest(out, int(views), dtype), check=False, overrides=[])
        return 0
    if kind == "scores":
        from megakd.evaluation.of_model import evaluate_model

        student = load_recipe(recipe).student
        assert student is not None, "a study scores models"
        out.mkdir(parents=True, exist_ok=True)
        # Models of images alone are teachers; a student may start from random weights without a word.
        model = Teacher(**student.model_dump(exclude_defaults=True)) if image_only.names_one(student) else student
        evaluate_model(model, recipe, [], out / EVALUATION)
        return 0
    from megakd.training.command import run_command

    # run.json and error messages show the command that does the same by itself
    sys.argv = ["megakd/train.py", "--recipe", recipe, "--out", str(out)]
    return run_command(sys.argv[1:])


def _end_with_the_study() -> None:
    """A study that is killed leaves no run behind that holds its folder."""
    study = multiprocessing.parent_process()
    if study is not None:
        wait([study.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
