"""In which floating type a run's models compute: decided here and nowhere else.

bf16 on a GPU, float32 on a CPU. MEGAKD_PRECISION=bf16 or fp32 in the environment says otherwise, for every part at once: teachers, the
built-in DeepSpeed configuration, stores, decoders. With bf16 a CPU takes every branch that a GPU takes: a rehearsal of a job before it
queues. A DeepSpeed JSON that names its own `bf16` section keeps its word about the student.
"""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16"]

VARIABLE = "MEGAKD_PRECISION"
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def asked() -> Precision | None:
    """What the environment asks for. Raises ValueError naming the variable for anything else than bf16, fp32 or nothing."""
    value = os.environ.get(VARIABLE, "")
    for known in _DTYPES:
        if value == known:
            return known
    if value:
        raise ValueError(f"{VARIABLE} = {value!r} in the environment: set it to bf16 or fp32, or unset it for the device's own")
    return None


def of(device: torch.device) -> Precision:
    """Of models on `device`. Raises ValueError as `asked` does."""
    return asked() or ("bf16" if device.type == "cuda" else "fp32")


def dtype(precision: Precision) -> torch.dtype:
    """torch's name for it."""
    return _DTYPES[precision]


def exact(scalar: Tensor) -> Tensor:
    """A parameter of one number in float32, as its optimizer holds it; what is differentiated is the parameter.

    An engine in bf16 rounds its module's parameters. bf16 has steps of 0.8 % and more: a logit scale's logarithm of 4.6 moves by 0.03,
    the scale by 3 %. The engine leaves the optimizer's own value with the parameter (`Engine`), and this reads it.
    """
    rounded = scalar.float()
    own: Tensor | None = getattr(scalar, "in_float32", None)
    return rounded if own is None else rounded + (own.reshape(rounded.shape) - rounded).detach()
