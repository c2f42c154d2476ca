"""Logits are float32 here, whatever the program around has switched on: autocast, TF32 on CUDA, bf16 products on a CPU.

A training program rightly wants TF32 for its towers. At a logit scale of 100 the same switch would move a logit by 0.05, and a
similarity of two well matched pairs with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Precisions of float32 products in which nothing is cut off. "none": nothing was set, which is full precision.
_FULL = ("none", "ieee")
ONCE = "only backend 'eager' on one process has a second derivative (create_graph=True)"


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and float32 matrix products in float32. What was set before is set again at the end.

    The switches belong to the process, so another thread that multiplies meanwhile does so in full precision too.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    if all(precision in _FULL for precision in before):
        with torch.autocast(device.type, enabled=False):
            yield
        return
    try:
        older: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer switches, of which the older one cannot speak
        older = None
    # the older switch sets both backends and stays readable, which torch.compile's guards rely on
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


class _Product(torch.autograd.Function):
    """left @ right.T, in full precision in the backward pass too, where autograd's own product would follow the switches."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        with full_precision(left.device):
            return left @ right.T

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return product(slope, right.T) if wanted[0] else None, product(slope.T, left.T) if wanted[1] else None


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T, (M, D) by (N, D). Differentiable as often as wanted."""
    made: Tensor = _Product.apply(left, right)
    return made


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[1:]
        leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(inputs, wanted, strict=True)]
        with torch.set_grad_enabled(any(wanted)), full_precision(inputs[0].device):
            outputs = function(*leaves)
        returned = tuple(output.detach() for output in outputs)
        ctx.inside, ctx.device = (leaves, outputs), inputs[0].device
        ctx.mark_non_differentiable(*(made for made, output in zip(returned, outputs, strict=True) if not output.requires_grad))
        return returned

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE)
        if ctx.inside is None:
            raise RuntimeError(
                "backend 'compiled' keeps what its backward pass needs for one such pass; run the loss again, or take 'eager'"
            )
        (leaves, outputs), ctx.inside = ctx.inside, None
        reached = [(output, slope) for output, slope in zip(outputs, upstream, strict=True) if output.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with full_precision(ctx.device):
            found = iter(torch.autograd.grad([out for out, _ in reached], wanted, [slope for _, slope in reached], allow_unused=True))
        return None, *(next(found) if leaf.requires_grad else None for leaf in leaves)


def run(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """function(*inputs), its forward and its backward pass both in full precision: for what torch.compile made, whose backward is its own.

    One backward pass alone, and no second derivative.
    """
    made: tuple[Tensor, ...] = _Run.apply(function, *inputs)
    return made
