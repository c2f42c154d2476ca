"""The floating type that a run's models compute in: decided here and nowhere else.

bf16 on a GPU, float32 on a CPU, or what MEGAKD_PRECISION in the environment says, for teachers, the built-in DeepSpeed configuration,
stores and decoders at once; with bf16 a CPU takes every branch of a GPU. A DeepSpeed JSON's own `bf16` section decides on the student.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]

# Layers with running statistics, which stay float32; timm's kinds are of these, too.
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

VARIABLE = "MEGAKD_PRECISION"
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def asked() -> Precision | None:
    """By the environment. Raises ValueError naming the variable for anything else than bf16, fp32 or nothing."""
    value = os.environ.get(VARIABLE, "")
    if value and value not in _DTYPES:
        raise ValueError(f"{VARIABLE} = {value!r} in the environment: set it to bf16 or fp32, or unset it for the device's own")
    return next((known for known in _DTYPES if value == known), None)


def of(device: torch.device) -> Precision:
    """Of models on `device`. Raises ValueError as `asked` does."""
    return asked() or ("bf16" if device.type == "cuda" else "fp32")


def dtype(precision: Precision) -> torch.dtype:
    """torch's name for it."""
    return _DTYPES[precision]


def check_alike(device: torch.device, size: int) -> None:
    """Raise ValueError on every rank where the ranks would compute in different types. A collective of `size` ranks.

    One may see no GPU where the others do, or lack the variable that another has.
    """
    try:
        mine, wrong = of(device), None
    except ValueError as error:
        mine, wrong = "fp32", error
    answers = [torch.zeros(3, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(answers, torch.tensor([device.type == "cuda", mine == "bf16", wrong is not None]).long())
    rows = [answer.tolist() for answer in answers]
    if wrong is not None:
        raise wrong
    refused = [rank for rank, (_, _, faulty) in enumerate(rows) if faulty]
    if refused:
        raise ValueError(f"{VARIABLE} on rank {refused[0]} is neither bf16 nor fp32: set it alike on every rank, or unset it")
    for place, what, remedy in (
        (0, ("has no GPU", "has one"), "give every task a GPU (CUDA_VISIBLE_DEVICES, --gpus-per-task), or none any"),
        (1, ("computes in fp32", "in bf16"), f"export {VARIABLE} to every rank, or to none"),
    ):
        without = [rank for rank, row in enumerate(rows) if not row[place]]
        if 0 < len(without) < size:
            other = next(rank for rank, row in enumerate(rows) if row[place])
            raise ValueError(f"rank {without[0]} {what[0]} and rank {other} {what[1]}: {remedy}")


@contextlib.contextmanager
def of_towers(device: torch.device) -> Iterator[None]:
    """Towers that compute in float32 on a GPU do so in TF32 in here, eight times as fast.

    Not for the whole process: losses promise float32 logits, evaluations compare embeddings, and torch's switch is for CPUs as well.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact(scalar: Tensor) -> Tensor:
    """A parameter of one number in float32, as its optimizer holds it; what is differentiated is the parameter.

    An engine in bf16 rounds its module's parameters: a logit scale's logarithm of 4.6 moves by 0.03, the scale by 3 %. So `Engine` keeps
    the optimizer's value with the parameter.
    """
    rounded = scalar.float()
    own: Tensor | None = getattr(scalar, "in_float32", None)
    return rounded if own is None else rounded + (own.reshape(rounded.shape) - rounded).detach()
