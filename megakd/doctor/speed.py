"""Which backend computes losses and which product int8 teachers take here, by the code that training asks, each with a small test."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, get_args

from megakd.doctor.finding import Finding, Place

if TYPE_CHECKING:
    import torch

WIDTH = 128  # of embeddings
PAIRS = (1024, 4096)  # below and beyond the sizes for which the whole matrix is formed
ROWS, INPUTS, OUTPUTS = 256, 1024, 4096  # of a product: tokens, and the two sides of an MLP's matrix
MUCH = 2.0  # times as long as another way takes: worth a setting, and more than a busy machine's noise


class _Embeddings(NamedTuple):
    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor


def losses(_: Place) -> Iterator[Finding]:
    """The distillation loss of image-text similarities with its gradient, at a small and a large batch."""
    import torch

    from megakd.runtime import precision
    from megakd_kernels import choose, dispatch

    device = _device()
    for pairs in PAIRS:
        backend = choose("similarity_kd", pairs, device, torch.float32, halves=precision.of(device) == "bf16")
        student, teacher = _embeddings(pairs, device, learned=True), _embeddings(pairs, device, learned=False)
        seconds = _best({"loss": functools.partial(_distil, student, teacher)}, device, rounds=2)["loss"]
        facts = {"backend": backend, "pairs": pairs, "width": WIDTH, "seconds": seconds, "device": device.type}
        said = f"{pairs:,} pairs by {backend}: {seconds * 1e3:.1f} ms with the gradient"
        why = dispatch.why_not_triton(device, torch.float32) if device.type == "cuda" and backend == "chunked" else None
        if why:
            yield Finding(f"loss_{pairs}", "slow", f"{said}; Triton's kernels cannot run: {why}", "pip install triton", facts)
        else:
            yield Finding(f"loss_{pairs}", "ok", said, facts=facts)


def _distil(student: _Embeddings, teacher: _Embeddings) -> None:
    from megakd_kernels import similarity_kd

    loss = similarity_kd(student, teacher, hard=True)
    (loss.kd + loss.hard).backward()  # type: ignore[no-untyped-call]


def _embeddings(pairs: int, device: torch.device, *, learned: bool) -> _Embeddings:
    import torch
    from torch.nn import functional as F

    from megakd.runtime import precision

    dtype = precision.dtype(precision.of(device))
    image, text = (F.normalize(torch.randn(pairs, WIDTH, device=device), dim=-1).to(dtype).requires_grad_(learned) for _ in range(2))
    return _Embeddings(image, text, torch.tensor(20.0, device=device))


def int8(_: Place) -> Iterator[Finding]:
    """A product of activations with an int8 matrix, by each way, beside the type that models compute in."""
    import torch
    from torch.nn import functional as F

    from megakd.models.int8 import matmul
    from megakd.runtime import precision

    device = _device()
    chosen = matmul.resolved("auto", device)
    dtype = precision.dtype(precision.of(device))
    x_MI = torch.randn(ROWS, INPUTS, device=device, dtype=dtype)
    weight_OI = torch.randn(OUTPUTS, INPUTS, device=device, dtype=dtype)
    ways: dict[str, Callable[[], object]] = {"plain": functools.partial(F.linear, x_MI, weight_OI)}
    broken: dict[str, str] = {}
    for product in get_args(matmul.Product):
        way = functools.partial(matmul.linear, x_MI, *matmul.quantise_rows(weight_OI, matmul.levels_of(product)), None, 0.0, product)
        try:
            way()
        except Exception as error:  # of bitsandbytes' libraries, which have kernels for some GPUs and CUDA versions
            broken[product] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            ways[product] = way
    seconds = _best(ways, device)
    plain = seconds.pop("plain")
    facts = {"product": chosen, "seconds": seconds, "errors": broken, "plain_seconds": plain, "plain": str(dtype).removeprefix("torch.")}
    times = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items())
    said = f"{chosen} for teachers in 8 bit: {times}; {facts['plain']} {plain * 1e3:.1f} ms ({ROWS} x {INPUTS} by {OUTPUTS})"
    fastest = min(seconds, key=lambda name: seconds[name], default=chosen)
    if chosen in broken:
        remedy = f"--set teacher.int8_product={fastest}"
        yield Finding("int8", "fails", f"{chosen}, the choice for teachers in 8 bit, does not run here: {broken[chosen]}", remedy, facts)
    elif seconds[chosen] > MUCH * seconds[fastest]:
        yield Finding("int8", "slow", said, f"--set teacher.int8_product={fastest}", facts)
    elif seconds[chosen] > MUCH * plain:
        remedy = "8 bit saves memory here and no time: embed the data once (megakd embed), or hold the teacher in shares (teacher.mode)"
        yield Finding("int8", "slow", said, remedy, facts)
    else:
        yield Finding("int8", "ok", said, facts=facts)
    yield _bitsandbytes(seconds.get("bitsandbytes"), broken.get("bitsandbytes"), needed=chosen == "bitsandbytes")


def _bitsandbytes(seconds: float | None, error: str | None, *, needed: bool) -> Finding:
    """The row of its kernels, which transformers loads decoders in 8 and 4 bit with, too."""
    from megakd.runtime import environment

    version = environment.version("bitsandbytes")
    facts = {"version": version, "seconds": seconds, "error": error}
    if version is None:
        said = "not installed: decoders in 8 or 4 bit cannot be loaded"
        return Finding("bitsandbytes", "partly", said, "pip install bitsandbytes", facts)
    if error is None and seconds is not None:
        return Finding("bitsandbytes", "ok", f"bitsandbytes {version}: its int8 kernels run ({seconds * 1e3:.1f} ms)", facts=facts)
    remedy = "pip install -U bitsandbytes; python -m bitsandbytes says which library of CUDA it looks for"
    return Finding("bitsandbytes", "fails" if needed else "partly", f"bitsandbytes {version} does not run: {error}", remedy, facts)


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _best(ways: dict[str, Callable[[], object]], device: torch.device, rounds: int = 7) -> dict[str, float]:
    """Seconds of the best round of each after one that warms up. They take turns, because machines are noisy in phases."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + rounds):
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: min(taken[1:]) for name, taken in seconds.items()}
