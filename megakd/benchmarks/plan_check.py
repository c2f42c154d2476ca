"""Is what `megakd plan` says of memory true? The real training program, two steps of it, against the plan of the same recipe.

1. A tiny pair of models shows what the interpreter, the libraries and the loader hold: the baseline (on a GPU there is none).
2. Each case trains two steps and is killed; the run's own log has the peak: resident set on a CPU, allocated memory on a GPU.
3. Predicted is the plan's peak plus the baseline.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megakd.benchmarks.common.children import ended_by_sigterm, running
from megakd.data.shapes import write_world
from megakd.planning import plan as planner
from megakd.recipe import load as recipes
from megakd.runtime.console import plain
from megakd.runtime.run_folder import METRICS, read_metrics

TOLERANCE = 0.15
STEPS, RUN_SECONDS = 2, 900
# glibc keeps freed blocks below 32 MB for itself, 10 % of a ViT-B-32's training: its allocator would be measured with the program.
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_=1048576"
TINY = (
    "{ embed_dim = 16, vision_cfg = { image_size = 32, patch_size = 16, width = 32, layers = 1, head_width = 16 }, "
    "text_cfg = { context_length = 77, vocab_size = 49408, width = 8, heads = 1, layers = 1 } }"
)
RECIPE = """
name = "plan-check"
data = {{ train = "{shards}/train/*.tar", workers = 0 }}
student = {{ {student} }}
teacher = {{ {teacher}, pretrained = "random" }}
objectives = {{ contrastive = 1.0, similarity = 1.0 }}
optim = {{ steps = 100000, batch = {batch}, lr = 1e-4 }}
checkpoint = {{ every = 100000 }}
log = {{ every = 1 }}
"""


@dataclass(frozen=True)
class Case:
    """batch: global. zero: the JSON's zero_optimization; None is stage 0 on a CPU and, as bf16 needs it, 1 on a GPU."""

    name: str
    teacher: str
    student: str
    batch: int
    ranks: int = 1
    zero: dict[str, Any] | None = None


@dataclass(frozen=True)
class Check:
    """Bytes of one rank: the plan's with the baseline, the run's, the baseline alone."""

    case: Case
    predicted: float
    measured: float
    baseline: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured"""
        return self.predicted / self.measured - 1


B32, S32 = 'model = "ViT-B-32"', 'model = "ViT-S-32"'
_BUCKETS = {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
CASES = [
    Case("plain, 1 rank", B32, S32, 24),
    Case("plain, 1 rank, checkpointing", B32, S32 + ", activation_checkpointing = true", 24),
    Case("ZeRO-2, 2 ranks", S32, S32, 16, 2, {"stage": 2, **_BUCKETS}),
]


def run(file: Path | None = None) -> None:
    """Measure all cases, print predicted against measured, and write JSON to `file`. Raises ValueError when a run fails."""
    checks = measure(CASES)
    table = Table(title=f"memory of a rank, GB, on {_device()}", title_justify="left")
    for column in ("case", "baseline", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for one in checks:
        table.add_row(
            one.case.name, *(f"{size / planner.GB:.2f}" for size in (one.baseline, one.predicted, one.measured)), f"{one.error:+.1%}"
        )
    plain().print(table)
    if file is not None:
        rows = [{**asdict(one), "error": one.error} for one in checks]
        file.write_text(json.dumps({"device": _device(), "tolerance": TOLERANCE, "checks": rows}, indent=2) + "\n", encoding="utf-8")


def measure(cases: list[Case]) -> list[Check]:
    """Train each case, and for each number of ranks and ZeRO setting the tiny pair."""
    baselines: dict[tuple[int, str], float] = {}
    checks = []
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-plan-") as name:
        folder = Path(name)
        shards = write_world(folder / "shapes", train=256, test=8, shard_size=128, zeroshot_per_class=1).out
        for number, case in enumerate(cases):
            key = (case.ranks, json.dumps(case.zero))
            if key not in baselines:
                tiny = Case("tiny", f"architecture = {TINY}", f"architecture = {TINY}", 2 * case.ranks, case.ranks, case.zero)
                measured, planned = _train(tiny, shards, folder / f"tiny{number}")
                baselines[key] = 0.0 if torch.cuda.is_available() else measured - planned
            measured, planned = _train(case, shards, folder / f"case{number}")
            checks.append(Check(case, planned + baselines[key], measured, baselines[key]))
    return checks


def _train(case: Case, shards: Path, folder: Path) -> tuple[float, float]:
    """Bytes at the peak of the first rank, and as planned."""
    folder.mkdir()
    recipe, config = folder / "recipe.toml", folder / "ds_config.json"
    recipe.write_text(RECIPE.format(shards=shards, student=case.student, teacher=case.teacher, batch=case.batch), encoding="utf-8")
    cuda = torch.cuda.is_available()
    kind, zero = ("h200", case.zero or {"stage": 1}) if cuda else ("cpu", case.zero or {"stage": 0})
    config.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": cuda}}), encoding="utf-8")
    planned = planner.plan(*recipes.load(str(recipe)), str(config), planner.Cluster(case.ranks, 1000, kind=kind)).rows[0].bytes
    program = Path(__file__).parents[1] / "train.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"] if case.ranks > 1 else []
    arguments = ["--recipe", str(recipe), "--ds_config", str(config), "--out", str(folder / "run")]
    with running(["env", ALLOCATOR, sys.executable, *launcher, str(program), *arguments], folder, "train", 1) as child:
        return child.wait_for(lambda: _peak(folder / "run"), RUN_SECONDS), planned


def _peak(run_folder: Path) -> float | None:
    """After so many steps, in bytes."""
    if not (run_folder / METRICS).exists():
        return None
    rows = [row for row in read_metrics(run_folder) if "loss" in row]
    return float(rows[-1]["memory_gb"]) * planner.GB if len(rows) >= STEPS else None


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
