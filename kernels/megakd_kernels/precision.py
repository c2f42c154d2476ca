"""Logits are computed in float32, whatever is switched on around: autocast, TF32 on CUDA, bf16 products on a CPU.

A training program wants TF32 for its towers. At a logit scale of 100 the same switch would move a logit by 0.05.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

# Precisions of float32 products that truncate nothing. "none": nothing was set, which is full precision.
_FULL = ("none", "ieee")
NO_SECOND_DERIVATIVE = "only backend 'eager' on one process has a second derivative (create_graph=True)"


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and float32 matrix products in float32; the settings before are restored at the end.

    The settings are the process's: another thread that multiplies meanwhile does so in full precision too.
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
    except RuntimeError:  # set through the newer interface, to values that the older one has no name for
        older = None
    # the older interface sets both backends and stays readable, which torch.compile's guards rely on
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


def save(ctx: Any, tree: Any) -> None:
    """Keep the tensors in a tuple, nested ones included, for a backward pass that calls `saved_once`."""
    tensors, ctx.layout = tree_flatten(tree)
    ctx.save_for_backward(*tensors)


def saved_once(ctx: Any) -> Any:
    """What `save` was given. Raises RuntimeError in a backward pass that is to be differentiated itself.

    `once_differentiable` raises only where the upstream gradient carries a graph; after a plain loss it would drop the term.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    return tree_unflatten(ctx.saved_tensors, ctx.layout)


class _Product(torch.autograd.Function):
    """left @ right.mT, in full precision in the backward pass too, where autograd's own product would follow the settings."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        with full_precision(left.device):
            return left @ right.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return product(grad, right.mT) if needs[0] else None, product(grad.mT, left.mT) if needs[1] else None


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.mT, (M, D) by (N, D), or as many of each as the other in a batch. Has derivatives of any order."""
    output: Tensor = _Product.apply(left, right)
    return output


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[1:]
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)]
        with torch.set_grad_enabled(any(needs)), full_precision(inputs[0].device):
            outputs = function(*leaves)
        detached = tuple(output.detach() for output in outputs)
        ctx.graph, ctx.device = (leaves, outputs), inputs[0].device
        ctx.mark_non_differentiable(*(value for value, output in zip(detached, outputs, strict=True) if not output.requires_grad))
        return detached

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        if ctx.graph is None:
            raise RuntimeError(
                "backend 'compiled' keeps what its backward pass needs for one such pass; run the loss again, or take 'eager'"
            )
        (leaves, outputs), ctx.graph = ctx.graph, None
        pairs = [(output, grad) for output, grad in zip(outputs, upstream, strict=True) if output.requires_grad]
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        with full_precision(ctx.device):
            grads = iter(torch.autograd.grad([output for output, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True))
        return None, *(next(grads) if leaf.requires_grad else None for leaf in leaves)


@cache
def _compiled(function: Callable[..., tuple[Tensor, ...]]) -> Any:
    return torch.compile(function, dynamic=False)


def run_compiled(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], *options: Any) -> tuple[Tensor, ...]:
    """function(*options, *inputs) by torch.compile. Its backward pass, of which there is one, is run in full precision as its forward is.

    It has no second derivative.
    """
    outputs: tuple[Tensor, ...] = _Compiled.apply(partial(_compiled(function), *options), *inputs)
    return outputs
