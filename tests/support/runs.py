"""Tiny runs for the tests: a recipe that trains in milliseconds a step, and ways to start it in this process or on several ranks."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megakd import cli
from megakd.runtime.launch import port
from megakd.runtime.run_folder import read_metrics
from megakd.training.command import run_command
from support import REPOSITORY, python_path
from support.forked import Forked, fork

TRAIN = REPOSITORY / "megakd" / "train.py"
# SLURM's lists of nodes, and the first one of each.
NODE_LISTS = [
    ("gpu7", "gpu7"),
    ("gpu7,gpu9", "gpu7"),
    ("gpu[07-10,12]", "gpu07"),
    ("gpu[12,07-10],login1", "gpu12"),
    ("rack[1-2]gpu[3-4],gpu1", "rack1gpu3"),
    ("a-1.example.org", "a-1.example.org"),
]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")

RECIPE = """
name = "tiny"

[data]
train = "{world}/train/*.tar"
workers = 0

[student]
tokenizer = "{world}/tokenizer"

[student.architecture]
embed_dim = 16
vision_cfg = {{ image_size = 32, patch_size = 8, width = 32, layers = 1, head_width = 16 }}
text_cfg = {{ context_length = 32, vocab_size = 128, width = 32, heads = 2, layers = 1 }}

[objectives]
contrastive = 1.0

[optim]
steps = 6
batch = 16
lr = 1e-3
warmup = 2
eps = 1e-3   # a gradient that is zero but for rounding then moves nothing, so runs on other ranks can be compared

[checkpoint]
every = 2

[log]
every = 1
"""

# Another resolution, tokenizer, context and width than the student's: nothing may be shared by accident.
TEACHER = (
    "teacher.architecture={ embed_dim = 24, vision_cfg = { image_size = 48, patch_size = 16, width = 32, layers = 1, head_width = 16 }, "
    "text_cfg = { context_length = 24, width = 32, heads = 2, layers = 1 } }",
    "teacher.pretrained=random",
)
# A second teacher, of a third width and resolution.
ENSEMBLE = (
    "ensemble.second.architecture={ embed_dim = 20, vision_cfg = { image_size = 32, patch_size = 16, width = 32, layers = 1, "
    "head_width = 16 }, text_cfg = { context_length = 20, width = 32, heads = 2, layers = 1 } }",
    "ensemble.second.pretrained=random",
)
# With a logit bias, as the sigmoid losses need it. Starting at -2 and -3 the probabilities are neither 0 nor 1.
BIASED = (
    "student.architecture.init_logit_bias=-2.0",
    f"{TEACHER[0][:-2]}, init_logit_bias = -3.0 }}",
    TEACHER[1],
)
EVERY_OBJECTIVE = (
    *BIASED,
    "objectives.similarity=2.0",
    "objectives.sigmoid_contrastive=0.3",
    "objectives.sigmoid_similarity=0.7",
    "objectives.interactive=0.5",
    "objectives.feature=0.5",
    "objectives.cross=0.3",
    "objectives.augmented_feature=0.3",
    "objectives.patch=0.5",
    "patch={ blocks = [-1], standardise = 'phi_s', statistics = 2, loss = 'smooth_l1' }",
    "objectives.patch_relation=0.5",
    "patch_relation.blocks=[-1]",
    "objectives.attention=0.5",
    "attention={ map = 'weights', loss = 'kl' }",
    "objectives.rkd=0.05",
    "objectives.dist=0.5",
    "objectives.dkd=0.2",
    "objectives.standardised=0.5",
)
# It asks for towers of one width, which those above are not. The weight keeps rounding, all that a key's bias gets, below eps.
GRADIENT = (TEACHER[0].replace("embed_dim = 24", "embed_dim = 16"), TEACHER[1], "objectives.gradient=0.01")
KD = (*TEACHER, "objectives.similarity=2.0", "objectives.feature=0.5")


TINY_LLAMA = (
    "{ model_type = 'llama', hidden_size = 32, num_hidden_layers = 2, num_attention_heads = 2, intermediate_size = 48, "
    "initializer_range = 0.1 }"
)


def question_source(world: Path, split: str, *, images: bool = True) -> str:
    """A shapes world's questions as a recipe names them."""
    files = f"questions = '{world}/questions/{split}_questions.json', annotations = '{world}/questions/{split}_annotations.json'"
    seen = f", images = '{world}/{split}/*.tar', image_name = '{{image_id:09d}}'" if images else ""
    return f"{{ format = 'vqav2', {files}{seen} }}"


def answering(world: Path) -> tuple[str, ...]:
    """Overrides that add adapters on a decoder, which `decoder.model` or `decoder.architecture` names, and the world's questions."""
    return (
        "decoder.lora={ rank = 4, alpha = 8.0, dropout = 0.1 }",
        "decoder.template={question}",
        "decoder.instruction=",
        "decoder.image_tokens=4",
        "decoder.layer=-1",
        "answers.max_length=64",
        "answers.batch=8",
        f"answers.train.shapes={question_source(world, 'train')}",
        f"evaluation.vqa.test={question_source(world, 'test')}",
        "evaluation.answer_tokens=3",
    )


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str


def settings(*overrides: str) -> list[str]:
    """Overrides as command-line arguments."""
    return [part for override in overrides for part in ("--set", override)]


def train(recipe: Path | str | None, *arguments: str | Path, sets: tuple[str, ...] | list[str] = ()) -> Finished:
    """The training program in this process: everything of it but the launcher and the interpreter's start."""
    _imported()
    command = [] if recipe is None else ["--recipe", str(recipe)]
    out, err = io.StringIO(), io.StringIO()
    with _untouched_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_command([*command, *map(str, arguments), *settings(*sets)])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
    return Finished(code, out.getvalue(), err.getvalue())


def ran(recipe: Path, out: Path, *sets: str, config: Path | None = None) -> Path:
    """A run that has to end well; its folder."""
    finished = train(recipe, "--out", out, *(() if config is None else ("--ds_config", config)), sets=sets)
    assert finished.code == 0, finished.err + finished.out
    return out


def megakd(*arguments: object) -> int:
    """The exit code of `megakd ARGUMENTS`, run in this process."""
    before, sys.argv = sys.argv, ["megakd", *map(str, arguments)]
    try:
        return cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before


@functools.cache
def _imported() -> None:
    """What runs import stays: the garbage collection at the end of each need not look at it, which took a third of a tiny run."""
    import megakd.training.run  # noqa: F401

    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _untouched_process() -> Iterator[None]:
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def environment(**more: str) -> dict[str, str]:
    """For child processes: one thread, the CPU, the environment's programs, and no launcher's variables but `more`.

    They import `support` as well, see `python_path`.
    """
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    ours = {"PATH": path, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **ours, **more}


def launch(launcher: str, *arguments: str | Path, ranks: int = 2) -> subprocess.Popen[str]:
    """Start ranks with `torchrun` or `deepspeed`. Ends with the launcher's exit code; see `finish`."""
    count = {"torchrun": f"--nproc_per_node={ranks}", "deepspeed": f"--num_accelerators={ranks}"}[launcher]
    place = ["--master_port", str(port(os.getpid()))]
    # Through the interpreter: the scripts' own first lines break when an environment is moved.
    module = {"torchrun": ["-m", "torch.distributed.run"], "deepspeed": [str(Path(sys.executable).with_name("deepspeed"))]}[launcher]
    command = [sys.executable, *module, count, *place, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment(), start_new_session=True, **pipes)


def start_ranks(*arguments: str | Path, program: Path = TRAIN, ranks: int = 2, folder: Path = REPOSITORY) -> list[Forked]:
    """Start ranks of the training program, or another, in `folder` without a launcher; each one's exit code and output are its own."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port(os.getpid()))}
    command = [str(program), *map(str, arguments)]
    return [fork(command, environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared), folder) for rank in range(ranks)]


def run_ranks(program: Path, *arguments: str | Path, ranks: int = 2, seconds: float = 240) -> list[str]:
    """What each of a program's ranks wrote; all have to end well."""
    ended = [finish(rank, seconds) for rank in start_ranks(*arguments, program=program, ranks=ranks)]
    assert not any(end.code for end in ended), "\n".join(f"{end.code}:\n{end.out[-3000:]}" for end in ended)
    return [end.out for end in ended]


def finish(process: subprocess.Popen[str] | Forked, seconds: float = 240) -> Finished:
    """Wait for a launcher or a rank and return its code and output; a hang is an error, and nothing survives it."""
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        raise AssertionError(f"still running after {seconds} s:\n{out[-4000:]}") from None
    return Finished(process.returncode, out, "")


def rank_process(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of one rank; loader workers inherit its variables, so the eldest counts."""
    found = [child for child in psutil.Process(launcher.pid).children(recursive=True) if _rank_of(child) == str(rank)]
    return min(found, key=lambda child: (child.create_time(), child.pid))


def _rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def wait_for(condition: Callable[[], bool], launcher: subprocess.Popen[str] | Forked, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if launcher.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"the run ended or hung before it got there:\n{finish(launcher, 1).out[-4000:]}")
        time.sleep(0.02)


def rows(run: Path) -> list[dict[str, Any]]:
    """The step rows of metrics.jsonl."""
    return [row for row in read_metrics(run) if "loss" in row] if (run / "metrics.jsonl").exists() else []


def curve(run: Path) -> list[tuple[Any, ...]]:
    """All numbers of each step that training determines; no times."""
    return [(row["step"], row["loss"], *row["losses"].values(), row["lr"], row["scale"], row["gradient_norm"]) for row in rows(run)]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if row.get("event") == name]


def zero(stage: int) -> dict[str, Any]:
    """A ZeRO section for models this small: stage 3 parts every parameter, and buckets do not take gigabytes of address space."""
    bucket = 10**5
    third = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": bucket}
    shared = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    return shared | (third if stage == 3 else {})


def ds_config(path: Path, **content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
