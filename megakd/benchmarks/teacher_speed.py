"""A teacher's image tower in 16 bit (on a CPU float32) against int8, by each way to multiply: images/s, weight memory, agreement.

Random weights of the full architecture: speed does not depend on values. Agreement with real activations and their outliers is not
what this shows.
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from statistics import median
from typing import Any, get_args

import open_clip
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.benchmarks import comparison
from megakd.models import casts, int8, int8_products, streaming
from megakd.runtime import precision, runlog

PACKAGES = ("torch", "open_clip_torch", "timm", "bitsandbytes", "triton")


def run(model: str, batch: int, rounds: int, file: Path | None = None) -> list[dict[str, Any]]:
    """Measure on the GPU, or on the CPU where there is none; print a table and a line of JSON. Raises ValueError for an unknown model."""
    if open_clip.get_model_config(model) is None:
        raise ValueError(f"--model {model}: open_clip has no such model; `open_clip.list_models()` lists all")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(model, batch, rounds, device)
    settings = {"model": model, "batch": batch, "rounds": rounds, "weights": "random"}
    where = comparison.conditions({name: runlog.version(name) for name in PACKAGES}, torch.get_num_threads())
    where["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    _report(rows, settings)
    line = json.dumps({"benchmark": "bench teacher-speed", "rows": rows, "settings": settings, **where})
    print(line)
    if file is not None:
        file.write_text(line + "\n", encoding="utf-8")
    return rows


def measure(model: str, batch: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a way to hold and multiply the weights, 16 bit first. They take turns, because machines are noisy in phases."""
    dtype = precision.dtype(precision.of(device))
    whole = _tower(model, dtype, device)
    size = whole.image_size if isinstance(whole.image_size, tuple) else (whole.image_size, whole.image_size)
    pixels = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    sides: dict[str, nn.Module] = {str(dtype).removeprefix("torch."): whole}
    for product in get_args(int8_products.Product):
        if product == "bitsandbytes" and int8_products.bitsandbytes() is None:
            continue
        sides[f"int8, {product}"] = copy.deepcopy(whole)
        int8.quantise(sides[f"int8, {product}"], product=product)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    outputs: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for name, side in sides.items():
            outputs[name], taken = _timed(side, pixels)
            if number:  # the first round warms up
                seconds[name].append(taken)
    first, *_ = sides
    return [
        {
            "weights": name,
            "images_per_second": batch / median(seconds[name]),
            "speed_ratio": median(seconds[first]) / median(seconds[name]),
            "weight_bytes": _bytes(side),
            "memory_ratio": _bytes(side) / _bytes(whole),
            "worst_cosine": float(F.cosine_similarity(outputs[name].double(), outputs[first].double()).min()),
        }
        for name, side in sides.items()
    ]


def _tower(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The image tower alone, drawn on the device: a CPU would take minutes for two billion weights."""
    with streaming.empty_parameters():
        clip = open_clip.create_model(model, pretrained_hf=False)
        if dtype == torch.bfloat16:
            casts.to_bf16(clip)
    tower: Any = clip.visual
    torch.manual_seed(0)
    for module in tower.modules():
        for name, parameter in module.named_parameters(recurse=False):
            filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if parameter.ndim > 1:
                filled.normal_(std=1 / math.sqrt(parameter[0].numel()))
            else:
                filled.fill_(1.0 if name == "weight" else 0.0)
            setattr(module, name, nn.Parameter(filled, requires_grad=False))
    return tower.to(device).eval()


def _timed(side: nn.Module, pixels: Tensor) -> tuple[Tensor, float]:
    _wait(pixels.device)
    start = time.perf_counter()
    with torch.no_grad():
        output: Tensor = side(pixels)
    _wait(pixels.device)
    return output, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _report(rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    table = Table(title=f"image tower of {settings['model']}, batch {settings['batch']}, random weights")
    for name in ("weights", "images/s", "speed", "GB of weights", "memory", "worst cosine"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    for row in rows:
        numbers = f"{row['images_per_second']:.2f}", f"{row['speed_ratio']:.2f}x", f"{row['weight_bytes'] / 1e9:.2f}"
        table.add_row(row["weights"], *numbers, f"{row['memory_ratio']:.2f}x", f"{row['worst_cosine']:.5f}")
    Console().print(table)
