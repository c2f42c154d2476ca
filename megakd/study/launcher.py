"""Training runs started as a user starts them: `deepspeed megakd/train.py` in processes of their own, one rank a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megakd.recipe import Recipe
from megakd.recipe.load import load_recipe
from megakd.runtime import launch
from megakd.runtime.exits import EXIT_USER_ERROR

SHIPPED_DATA = "data/shapes"
_LINES_KEPT = 400  # of a run's output, for the message of one that fails
_LAUNCHERS = re.compile(r"\[20\d\d-\d\d-\d\d ")  # lines of DeepSpeed's launcher begin with the time


class TrainingFailed(RuntimeError):
    """A run that ended before its last step. code: see `runtime/exits.py`; after 85, a signal, the same call resumes the run."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def train(
    recipe: Recipe | str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    ds_config: str | Path | None = None,
    resume: str = "auto",
    ranks: int | None = None,
) -> Path:
    """Train `recipe` (a name, a file, or one in memory) in the run folder `out`, and return it: model, scores and curves are in there.

    The run is what `deepspeed megakd/train.py` starts, in processes of its own, because DeepSpeed keeps one engine's state a process: this
    one holds no weights, and may be a notebook. Its output is printed here. The same call goes on from the newest checkpoint, and returns
    at once when the run is finished.
    overrides: settings that differ, "optim.lr=3e-4". ds_config: a DeepSpeed JSON. resume: "auto", "none" or a checkpoint's folder.
    ranks: processes; default one a GPU, without a GPU one or two. Several machines: `megakd submit`.

    Raises ValueError with what is wrong with recipe, data or configuration, and TrainingFailed for another end than the last step's.

    >>> run = megakd.train("smoke_teacher", "runs/mine", ["optim.steps=2", "optim.warmup=1", "optim.batch=16"])
    $ deepspeed megakd/train.py --recipe smoke_teacher --out runs/mine --set optim.steps=2 --set optim.warmup=1 --set optim.batch=16
    ...
    done: runs/mine
    >>> sorted(path.name for path in run.glob("*.json"))
    ['evaluation.json', 'run.json']
    """
    if not isinstance(recipe, Recipe):
        load_recipe(recipe, overrides)  # raises for mistakes before processes start
    more = ["--resume", resume] if resume != "auto" else []
    more += ["--ds_config", str(ds_config)] if ds_config is not None else []
    output: deque[str] = deque(maxlen=_LINES_KEPT)
    with tempfile.TemporaryDirectory(prefix="megakd-recipe-") as folder:
        name = str(write_recipe(recipe, Path(folder) / "recipe.json") if isinstance(recipe, Recipe) else recipe)
        process = _start(name, Path(out), overrides, more, ranks)
        with _ended_with(process):
            for line in process.stdout or ():
                print(line, end="", flush=True)
                output.append(line)
            code = process.wait()
    if code:
        message = last_words(output)
        if code == EXIT_USER_ERROR:
            raise ValueError(message)
        raise TrainingFailed(f"the run in {out} ended with exit code {code}: {message}", code)
    return Path(out)


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """The recipe as a file that `--recipe` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}, indent=1) + "\n", encoding="utf-8")
    return path


def moved(shipped: str, data: Path) -> list[str]:
    """Overrides that point a shipped recipe, whose files are in data/shapes, to another folder."""
    return list(_moved("", load_recipe(shipped).model_dump(mode="json"), str(data))) if str(data) != SHIPPED_DATA else []


def _moved(key: str, value: Any, data: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _moved(f"{key}.{name}".lstrip("."), inner, data)
    elif isinstance(value, str) and value.startswith(f"{SHIPPED_DATA}/"):
        yield f"{key}={data}{value.removeprefix(SHIPPED_DATA)}"


def ranks_here() -> int:
    """How many ranks this machine is given: one a GPU; without a GPU one a CPU core, at most two."""
    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def _start(recipe: str, folder: Path, overrides: Sequence[str], more: Sequence[str], ranks: int | None) -> subprocess.Popen[str]:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error", "--master_port", str(launch.free_port())]
    if not torch.cuda.is_available():  # with GPUs the launcher counts them itself, and minds CUDA_VISIBLE_DEVICES
        ranks = ranks or ranks_here()
    launcher += ["--num_accelerators", str(ranks)] if ranks else []
    arguments = ["--recipe", recipe, "--out", str(folder), *more, *(part for item in overrides for part in ("--set", item))]
    print("$ deepspeed megakd/train.py " + shlex.join(arguments), flush=True)
    program = str(Path(__file__).parents[1] / "train.py")
    return subprocess.Popen(
        [*launcher, program, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def environment() -> dict[str, str]:
    """Of a training: this process's, with the interpreter's folder in PATH."""
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    if not torch.cuda.is_available():
        # One thread a rank: OpenMP threads wait for each other by spinning, which is ten times as slow on a busy machine.
        variables |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return variables


def last_words(lines: Iterable[str]) -> str:
    """What a failed run said last: its own message, without the launcher's lines after it."""
    own = [line.rstrip() for line in lines if line.strip() and not _LAUNCHERS.match(line)]
    first = max((number for number, line in enumerate(own) if line.startswith("error: ")), default=max(0, len(own) - 20))
    return "\n".join(own[first:]).removeprefix("error: ")


@contextlib.contextmanager
def _ended_with(process: subprocess.Popen[str]) -> Iterator[None]:
    """Ctrl-C in the block ends the run by SIGTERM, after a checkpoint, and is raised again."""
    try:
        yield
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
