"""A teacher's image tower in 16 bit (on a CPU float32) against int8, by each way to multiply: images/s, weight memory, agreement.

Random weights of the full architecture: speed does not depend on values. Agreement does: trained giants have outliers in their
activations and random weights have none, so `outliers` puts some there that change nothing in float, and adds what a recipe can do.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from statistics import median
from typing import Any, get_args

import open_clip
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.benchmarks import outliers as outlier_channels
from megakd.benchmarks.common import comparison
from megakd.models import casts, streaming
from megakd.models.int8 import convert, matmul
from megakd.models.int8.agreement import agreement
from megakd.models.int8.migration import Originals, Reference, migrate
from megakd.models.weights import InMemory
from megakd.runtime import environment, precision
from megakd.runtime.console import plain
from megakd.runtime.launch import World

PACKAGES = ("torch", "open_clip_torch", "timm", "bitsandbytes", "triton")


def run(model: str, batch: int, rounds: int, file: Path | None = None, *, outliers: bool = False) -> list[dict[str, Any]]:
    """Measure on the GPU, or on the CPU where there is none; print a table and a line of JSON. Raises ValueError for an unknown model."""
    if open_clip.get_model_config(model) is None:
        raise ValueError(f"--model {model}: open_clip has no such model; `open_clip.list_models()` lists all")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = measure(model, batch, rounds, device, outliers=outliers)
    weights = "random with outliers" if outliers else "random"
    settings = {"model": model, "batch": batch, "rounds": rounds, "weights": weights}
    where = comparison.conditions(environment.versions(PACKAGES), torch.get_num_threads())
    where["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    _report(rows, settings)
    comparison.record({"benchmark": "bench teacher-speed", "rows": rows, "settings": settings, **where}, file)
    return rows


def measure(model: str, batch: int, rounds: int, device: torch.device, *, outliers: bool = False) -> list[dict[str, Any]]:
    """One row a way to hold and multiply the weights, 16 bit first. They take turns, because machines are noisy in phases."""
    dtype = precision.dtype(precision.of(device))
    whole = _tower(model, dtype, device)
    size = whole.image_size if isinstance(whole.image_size, tuple) else (whole.image_size, whole.image_size)
    pixels, others = (_images(batch, size, seed).to(device, dtype) for seed in (0, 1))
    if outliers:
        outlier_channels.add(whole)
    sides: dict[str, nn.Module] = {str(dtype).removeprefix("torch."): whole}
    for product in get_args(matmul.Product):
        if product == "bitsandbytes" and matmul.bitsandbytes() is None:
            continue
        sides[f"int8, {product}"] = copy.deepcopy(whole)
        convert.quantise(sides[f"int8, {product}"], product=product)
        if outliers and product != "dequantise":
            sides[f"int8, {product}, threshold 6"] = copy.deepcopy(whole)
            convert.quantise(sides[f"int8, {product}, threshold 6"], product=product, threshold=6.0)
            sides[f"int8, {product}, calibrated"] = _calibrated(whole, others, product)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    outputs: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for name, side in sides.items():
            outputs[name], taken = _timed(side, pixels)
            if number:  # the first round warms up
                seconds[name].append(taken)
    first, *_ = sides
    unit = {name: F.normalize(output.double(), dim=-1) for name, output in outputs.items()}
    agreed = {name: agreement(found, unit[first], None, None, 1.0) for name, found in unit.items()}
    return [
        {
            "weights": name,
            "images_per_second": batch / median(seconds[name]),
            "speed_ratio": median(seconds[first]) / median(seconds[name]),
            "weight_bytes": _bytes(side),
            "memory_ratio": _bytes(side) / _bytes(whole),
            "worst_cosine": agreed[name].worst_cosine,
            "centred_cosine": agreed[name].centred,
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


def _images(batch: int, size: tuple[int, int], seed: int) -> Tensor:
    """Noise, and coarse noise above it, so that images differ in more than what averages out."""
    generator = torch.Generator().manual_seed(seed)
    fine, coarse = torch.randn(batch, 3, *size, generator=generator), torch.randn(batch, 3, 8, 8, generator=generator)
    return fine + 2 * F.interpolate(coarse, size)


def _calibrated(whole: nn.Module, pixels: Tensor, product: matmul.Product) -> nn.Module:
    side = copy.deepcopy(whole)
    convert.quantise(side, product=product, migrated=True)
    originals = Originals(convert.matrices(side), lambda: InMemory(whole.state_dict(), "drawn"), World(0, 1, pixels.device))
    with Reference(originals) as reference, torch.no_grad():
        reference.noting = True
        side(pixels)
    migrate(originals, reference.largest, lambda parameter, value: parameter.data.copy_(value))
    return side


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
    table = Table(title=f"image tower of {settings['model']}, batch {settings['batch']}, weights {settings['weights']}")
    for name in ("weights", "images/s", "speed", "GB of weights", "memory", "worst cosine", "centred cosine"):
        table.add_column(name, justify="left" if name == "weights" else "right")
    for row in rows:
        numbers = f"{row['images_per_second']:.2f}", f"{row['speed_ratio']:.2f}x", f"{row['weight_bytes'] / 1e9:.2f}"
        cosines = f"{row['worst_cosine']:.5f}", f"{row['centred_cosine']:.5f}"
        table.add_row(row["weights"], *numbers, f"{row['memory_ratio']:.2f}x", *cosines)
    plain().print(table)
