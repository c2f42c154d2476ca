"""The golden runs: the shipped smoke recipes at the size of a test, how each is started, and how its numbers are compared.

A workplace is a folder with `data/shapes` (a small world, written anew) and `runs` (a copy of `written/`), where the recipes' own relative
paths hold. Of megakd's modules only the world's writer and the command line are named here, so that the rest may move.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from megakd.cli import app
from megakd.data.shapes import write_world
from support import TESTS
from support.runs import ds_config, finish, rows, settings, start_ranks, train, zero

HERE = TESTS / "golden"
WRITTEN = HERE / "written"
TOLERANCE = 1e-4  # relative, of every number of a curve on another machine
SHARE_TOLERANCE = 0.1  # of a score on another machine: one of the 14 things in the smallest set may turn, or six of 60 pairs
LOGGED = ("step", "loss", "lr", "scale", "bias", "gradient_norm")  # of a row of metrics.jsonl, besides `losses`
PACKAGES = ("torch", "deepspeed", "open_clip_torch", "transformers", "peft", "pillow")

# eps: a gradient that is zero but for rounding then moves nothing, which another machine would otherwise move the other way.
SHORT = (
    *("optim.steps=12", "optim.batch=24", "optim.warmup=4", "optim.lr=2e-3", "optim.eps=1e-4"),
    *("checkpoint.every=6", "checkpoint.keep=2", "log.every=1", "data.workers=0"),
)
STUDENT = (
    "student.architecture={ embed_dim = 16, init_logit_bias = -2.0, "
    "vision_cfg = { image_size = 36, patch_size = 12, width = 16, layers = 2, head_width = 8 }, "
    "text_cfg = { context_length = 32, vocab_size = 128, width = 16, heads = 2, layers = 1 } }",
)
TEACHER = (
    "student.architecture={ embed_dim = 20, init_logit_bias = -3.0, "
    "vision_cfg = { image_size = 36, patch_size = 12, width = 16, layers = 2, head_width = 8 }, "
    "text_cfg = { context_length = 32, vocab_size = 128, width = 16, heads = 2, layers = 1 } }",
    "objectives.sigmoid_contrastive=1.0",
)
# A decoder of random weights: its bundle holds all it needs. A trained one would be known to it by an absolute path.
DECODER = (
    "decoder={ architecture = { model_type = 'llama', hidden_size = 32, num_hidden_layers = 2, num_attention_heads = 2, "
    "intermediate_size = 48, max_position_embeddings = 256, tie_word_embeddings = false, initializer_range = 0.2 }, "
    "tokenizer = 'data/shapes/tokenizer', adapt = 'lora', lora = { rank = 8, alpha = 16.0, dropout = 0.0 }, "
    "template = '{question}', instruction = '', image_tokens = 4 }",
)
TOWER = ("student.model=local-dir:runs/smoke_teacher/model",)
LANGUAGE = ("decoder.model=runs/vqa_lora/bundle/language", "decoder.lora={ rank = 8, alpha = 16.0, dropout = 0.0 }")
AUGMENTED = ("views.crop_scale=[0.7, 1.0]", "views.flip=0.5")
# Not by int_mm, the default: on a CPU without VNNI its sums are cut off at 16 bits, and the teacher is another one there.
INT8 = ("teacher.mode=zero3_int8", "teacher.int8_product=dequantise", "teacher.outlier_threshold=0.0")
EVERY_OBJECTIVE = (
    *("objectives.similarity=2.0", "objectives.sigmoid_contrastive=0.3", "objectives.sigmoid_similarity=0.7"),
    *("objectives.interactive=0.5", "objectives.feature=0.5"),
)


ALONE = (*SHORT, *STUDENT)
STORE = ("teacher.store=runs/store", "teacher.store_miss=fail")
# About the first picture of the test split.
QUESTIONS = ("what is there ?", "is there a red circle ?", "how many things are there ?", "what colour is the square ?")


@dataclass(frozen=True)
class GoldenRun:
    """A shipped recipe with overrides, on one rank or two.

    ds_config: content of the DeepSpeed JSON, none by default.
    """

    recipe: str
    sets: tuple[str, ...]
    ranks: int = 1
    ds_config: dict[str, Any] = field(default_factory=dict)


RUNS = {
    "one_rank": GoldenRun("smoke", ALONE),
    "two_ranks": GoldenRun(
        "smoke", (*ALONE, *AUGMENTED, *EVERY_OBJECTIVE), 2, {"zero_optimization": zero(2), "train_micro_batch_size_per_gpu": 4}
    ),
    "zero3_int8_teacher": GoldenRun("smoke", (*ALONE, "objectives.interactive=1.0", *INT8), 2, {"zero_optimization": zero(3)}),
    "answers": GoldenRun("vqa_lora", (*SHORT, *LANGUAGE, *TOWER, "decoder.start=runs/vqa_lora/bundle")),
    "alongside": GoldenRun("vqa_alongside", (*ALONE, *LANGUAGE, "answers.batch=16")),
}


def make_workplace(folder: Path, *, runs: Path | None = WRITTEN) -> Path:
    """Write the small world to `folder`/data/shapes and copy what the golden commit has written to `folder`/runs."""
    write_world(folder / "data" / "shapes", train=240, test=60, shard_size=120, zeroshot_per_class=2, caption_noise=0.5)
    if runs is not None:
        shutil.copytree(runs, folder / "runs")
    return folder


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The workplace as the working directory, and one thread: with several, sums are in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        torch.set_num_threads(threads)


def run(name: str, workplace: Path, out: str, *more: str) -> Path:
    """Train the golden run `name`, into the folder `out` of the workplace and with `more` settings, and return that folder."""
    golden = RUNS[name]
    arguments = ["--recipe", golden.recipe, "--out", out, *settings(*golden.sets, *more)]
    if golden.ds_config:
        arguments += ["--ds_config", str(ds_config(workplace / f"{name}.json", **golden.ds_config))]
    with inside(workplace):
        if golden.ranks == 1:
            finished = [train(None, *arguments)]
        else:
            finished = [finish(process) for process in start_ranks(*arguments, folder=workplace)]
    assert [one.code for one in finished] == [0] * golden.ranks, finished[0].out + finished[0].err
    return workplace / out


def megakd(*arguments: str) -> str:
    """What `megakd` with these arguments prints, in this process."""
    finished = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200", "TERM": "dumb"})
    assert finished.exit_code == 0, finished.output
    return finished.output


def ask(question: str) -> str:
    """What the bundle of the golden commit answers about the first test picture; called inside a workplace."""
    picture = Path("picture.jpg")
    with tarfile.open("data/shapes/test/00000.tar") as tar:
        member = tar.extractfile("000000000.jpg")
        assert member is not None
        picture.write_bytes(member.read())
    return megakd("answer", "runs/vqa_lora/bundle", str(picture), question).splitlines()[-1]


def measured(folder: Path) -> dict[str, Any]:
    """What of a run's results is golden: every logged number but times and memory by name and step, and all scores."""
    steps = rows(folder)
    curve = {name: [row[name] for row in steps] for name, value in steps[0].items() if name in LOGGED}
    curve |= {f"losses.{name}": [row["losses"][name] for row in steps] for name in steps[0]["losses"]}
    return {"curve": curve, "scores": scores(folder)}


def scores(folder: Path) -> dict[str, float]:
    """The numbers of evaluation.json, counts among them, by their keys joined with dots."""
    found: dict[str, float] = {}

    def walk(content: Any, name: str) -> None:
        if isinstance(content, dict):
            for key, value in content.items():
                walk(value, f"{name}.{key}" if name else key)
        elif isinstance(content, int | float) and name != "images_per_second":
            found[name] = content

    walk(json.loads((folder / "evaluation.json").read_text(encoding="utf-8")), "")
    return found


def differences(golden: dict[str, Any], found: dict[str, Any], *, exact: bool) -> list[str]:
    """Where a run's numbers are not the golden ones, a line a name; empty when they are.

    exact: to the last bit, as on the machine that made the golden ones. Else curves may be TOLERANCE off, relative to the number, and
    scores SHARE_TOLERANCE; counts have to be equal anywhere. Scores that the golden ones lack are none.
    """
    lines = []
    for kind in ("curve", "scores"):
        here, there = golden[kind], found[kind]
        odd = here.keys() - there.keys() if kind == "scores" else here.keys() ^ there.keys()  # later versions score more
        lines += [f"{kind}: {name} is in one of them only" for name in sorted(odd)]
        for name in sorted(here.keys() & there.keys()):
            lines += _difference(name, here[name], there[name], exact, kind)
    return lines


def _difference(name: str, golden: Any, found: Any, exact: bool, kind: str) -> list[str]:
    if kind == "scores":
        allowed = 0 if exact or isinstance(golden, int) else SHARE_TOLERANCE
        return [] if abs(golden - found) <= allowed else [f"{name}: {found!r}, golden {golden!r}"]
    if len(golden) != len(found):
        return [f"{name}: {len(found)} steps, golden {len(golden)}"]
    for step, (one, other) in enumerate(zip(golden, found, strict=True), 1):
        if not abs(one - other) <= (0 if exact else TOLERANCE * abs(one)):  # NaN is no equal
            worst = max(abs(a - b) / abs(a) for a, b in zip(golden, found, strict=True) if a)
            return [f"{name}: {other!r} at step {step}, golden {one!r}; at most {worst:.1e} off, relative"]
    return []


def golden(name: str) -> dict[str, Any]:
    """Content of a golden file."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def machine() -> dict[str, Any]:
    """What decides the last bit of a float: the processor, the instructions that torch chooses on it, the libraries' versions."""
    known = dict.fromkeys(("vendor_id", "cpu family", "model", "model name", "stepping", "cache size"), "")
    flags = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            known |= {key: value} if key in known else {}
            flags = value if key == "flags" else flags
    return {
        "architecture": platform.machine(),
        "processor": known,
        "flags_sha256": hashlib.sha256(flags.encode()).hexdigest(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "chosen": {name: os.environ[name] for name in ("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA") if name in os.environ},
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def digest(folder: Path) -> str:
    """SHA-256 over names and contents of a world, without the page that says how it was made."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "world.json"):
        total.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
