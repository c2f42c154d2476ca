"""What a giant teacher costs to hold: seconds to load it, memory and bytes read of every rank, in each of its modes.

1. A file of random bf16 weights of the model's names and shapes is written once, tensor by tensor, and deleted afterwards.
2. `teacher_load_side` runs on every rank: it loads the teacher from that file and embeds a few pairs.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from megakd.benchmarks import teacher_load_side
from megakd.benchmarks.common import comparison
from megakd.benchmarks.common.children import ended_by_sigterm, running
from megakd.models import clip as clip_models
from megakd.models import streaming, weights
from megakd.recipe.placements import MODES
from megakd.runtime.console import plain

SECONDS = 1800  # patience with one mode
COLUMNS = {
    "load_seconds": "load s",
    "read_gb": "read GB",
    "start_gb": "start GB",
    "loaded_gb": "loaded GB",
    "peak_loading_gb": "peak loading GB",
    "peak_gb": "peak GB",
}


def run(
    model: str,
    mode: str,
    ranks: int,
    *,
    pairs: int = 2,
    forwards: int = 3,
    threads: int = 1,
    folder: Path | None = None,
    file: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure, print a table and a line of JSON, and return what each rank found (see `teacher_load_side.measure`).

    model: an open_clip name. mode: see MODES. pairs: image-text pairs a forward; the first forward is slower than the others.
    folder: where the weights are written for the while (2 bytes a parameter); default: the system's temporary folder.
    Raises ValueError for an unknown model or mode, too little room, and when a rank fails, with its last lines.
    """
    if mode not in MODES:
        raise ValueError(f"--mode {mode}: give {', '.join(MODES)}")
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="megakd-bench-", dir=folder) as name:
        path = Path(name) / "weights.safetensors"
        write_random(model, path)
        asked = {"model": model, "mode": mode, "weights": str(path), "pairs": pairs, "forwards": forwards}
        program = str(Path(__file__).with_name("teacher_load_side.py"))
        torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        # megakd/benchmarks is first on a program's path otherwise; torchrun hands -P to no rank, so each gets it by --no-python.
        command = [*torchrun, "--no-python", sys.executable, "-P", program, json.dumps(asked), name]
        files = [path.parent / f"rank-{rank}.json" for rank in range(ranks)]

        def all_there() -> list[dict[str, Any]] | None:
            there = all(file.exists() for file in files)
            return [json.loads(file.read_text(encoding="utf-8")) for file in files] if there else None

        with running(command, path.parent, "teacher-load", threads) as child:
            found = child.wait_for(all_there, SECONDS)
    settings = {"model": model, "mode": mode, "ranks": ranks, "pairs": pairs, "forwards": forwards}
    _report(found, settings, comparison.conditions({"torch": torch.__version__}, threads), file)
    return found


def write_random(model: str, path: Path) -> None:
    """Weights of `model` with which its activations stay finite: N(0, 0.02^2) for matrices, 1 for norms, 0 for biases; bf16."""
    with streaming.empty_parameters():
        clip = clip_models.build(teacher_load_side.description(model, clip_models.RANDOM), torch.device("cpu"), load_weights=False).clip
    state = {key: tuple(tensor.shape) for key, tensor in clip.state_dict().items()}
    needed = 2 * sum(torch.Size(shape).numel() for shape in state.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise ValueError(f"{path.parent} has {free / 1e9:.1f} GB left, {model} takes {needed / 1e9:.1f} GB; give another folder")
    # Drawn once and repeated: 2.5 billion draws would take longer than the measurement.
    pool = (0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).bfloat16()

    def tensor(key: str) -> Tensor:
        shape = state[key]
        if len(shape) < 2:
            return torch.full(shape, float(key.endswith(("weight", "gamma", "logit_scale"))), dtype=torch.bfloat16)
        size = torch.Size(shape).numel()
        return pool.repeat(-(-size // len(pool)))[:size].reshape(shape)

    weights.write(path, {key: (torch.bfloat16, shape) for key, shape in state.items()}, tensor)


def _report(found: list[dict[str, Any]], settings: dict[str, Any], where: dict[str, Any], file: Path | None) -> None:
    columns = {key: title for key, title in {**COLUMNS, "peak_gpu_gb": "peak GPU GB"}.items() if key in found[0]}
    table = Table("rank", *columns.values(), "forward s", title=f"{settings['model']}, {settings['mode']}", title_justify="left")
    for rank in found:
        seconds = " ".join(f"{value:.2f}" for value in rank["forward_seconds"])
        table.add_row(str(rank["rank"]), *(f"{rank[key]:.2f}" for key in columns), seconds)
    console = plain()
    console.print(table)
    console.print(f"{where['processor']}, {where['cores']} cores, load {where['load_average']}, {where['threads']} thread(s) a rank")
    console.print(where["command"], markup=False)
    comparison.record({"benchmark": "bench teacher-load", "settings": settings, "ranks": found, **where}, file)
