"""What of a module a checkpoint holds, by name, and how it is put back."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the module; callers have compared names and shapes, with messages for users."""
    targets = dict(module.named_parameters()) | persistent_buffers(module)
    with torch.no_grad():
        for name, value in weights.items():
            targets[name].copy_(value)


def held_shapes(module: nn.Module, frozen: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of `module` holds: trained parameters, those of `frozen`, and persistent buffers."""
    held = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad or name in frozen}
    return {name: tuple(value.shape) for name, value in (held | persistent_buffers(module)).items()}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state, such as batch norm's running statistics."""
    stored = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name in stored}
