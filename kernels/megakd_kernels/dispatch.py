"""Which backend computes a loss: what runs here, and what was measured to be the fastest."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from megakd_kernels.one_pass import OnePassKernels, TorchOnePass
from megakd_kernels.panels import chunk_rows
from megakd_kernels.two_pass import TwoPassKernels
from megakd_kernels.two_pass_torch import TorchTwoPass

BACKENDS = ("auto", "eager", "compiled", "chunked", "triton")

# "auto": device type -> loss -> (largest N, backend), in order; beyond the last N the backend of `BEYOND`.
# CPU: measured, kernels/benchmarks/results/cpu-amd-epyc.csv, and for the softmax losses in README.md: from 512 pairs on, InfoNCE alone from
# 1024, tiles are 1.1 to 1.5 times as fast as eager, and level with "compiled", which needs a C++ compiler, tens of seconds for each new
# shape and the whole matrix, and so runs only by name.
# CUDA: NOT measured yet. At 2048 eager holds ten matrices of 16 MB and launches outweigh the work.
TABLE: dict[str, dict[str, list[tuple[int, str]]]] = {
    "cpu": {
        "similarity_kd": [(256, "eager")],
        "contrastive": [(512, "eager")],
        "interactive_kd": [(256, "eager")],
        "sigmoid_kd": [(256, "eager")],
    },
    "cuda": {
        "similarity_kd": [(2048, "eager")],
        "contrastive": [(2048, "eager")],
        "interactive_kd": [(2048, "eager")],
        "sigmoid_kd": [(2048, "eager")],
    },
}
BEYOND = {"cpu": "chunked", "cuda": "triton"}
# Their Triton kernels form the logits themselves. Exact products of float32 do not run on the matrix units (`triton.tiles.tiles_for`), and
# cuBLAS, which the panels of "chunked" use, has better ones than a tile of 64 x 64. A reason, NOT a measurement.
HALVES_ONLY = ("similarity_kd", "contrastive")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot compute in `dtype` on `device`; None where they can."""
    if not _has_triton():
        return "the package triton is not installed"
    # Triton's interpreter runs the kernels on the CPU, slowly: for tests.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device, and the embeddings are on {device.type}"
    if dtype == torch.float64:
        return "it computes in float32, and an input is float64"
    return None


def choose(
    loss: str,
    pairs: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    halves: bool = True,
    backend: str = "auto",
    ring: bool = False,
    chunk: int | None = None,
) -> str:
    """The backend that will compute `loss` over `pairs` pairs of all ranks: `backend` itself, or what "auto" stands for there.

    dtype: what logits are computed in, float32 or float64. halves: whether all embeddings are float16 or bfloat16.
    Raises ValueError where the request contradicts itself or cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")
    if backend in ("eager", "compiled"):
        if chunk is not None:
            raise ValueError(f"backend {backend!r} forms the whole matrix at once and takes no chunk, got chunk={chunk}")
        if ring:
            raise ValueError(f"backend {backend!r} gathers the whole batch and knows no ring: use 'chunked', 'triton' or 'auto'")
    if backend == "triton" and (reason := why_not_triton(device, dtype)):
        raise ValueError(f"backend 'triton' cannot run here: {reason}; use 'auto' or 'chunked'")
    if backend != "auto":
        return backend
    if chunk is None and not ring:
        for largest, name in TABLE.get(device.type, {}).get(loss, []):
            if pairs <= largest:
                return name
    beyond = BEYOND.get(device.type, "chunked")
    if beyond == "triton" and (why_not_triton(device, dtype) or (loss in HALVES_ONLY and not halves)):
        return "chunked"
    return beyond


def two_pass_kernels(
    backend: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype, chunk: int | None, bound: float | None
) -> TwoPassKernels:
    """Of backend "chunked" or "triton", for a stripe of `rows` by blocks of `columns`. bound: what no |logit| exceeds, if known."""
    if backend == "triton":
        from megakd_kernels.triton.two_pass import TritonTwoPass  # here: it imports triton

        return TritonTwoPass.of(rows, columns, chunk, bound)
    return TorchTwoPass.of(rows, columns, dtype, device, chunk)


def one_pass_kernels(backend: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype, chunk: int | None) -> OnePassKernels:
    """Of backend "chunked" or "triton", for panels of `chunk` of the `rows` by blocks of `columns`."""
    if backend == "triton":
        from megakd_kernels.triton.one_pass import TritonOnePass  # here: it imports triton

        return TritonOnePass.of(rows, columns, chunk)
    return TorchOnePass(chunk or chunk_rows(rows, columns, dtype, device))
