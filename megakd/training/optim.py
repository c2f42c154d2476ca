"""What AdamW is given: its parameter groups and, step by step, its learning rate, a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from megakd.recipe import Optim


def learning_rate(optim: Optim, step: int) -> float:
    """Learning rate of the update number `step` (from 0): linear warm-up, then cosine to final_lr * lr, or constant."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def decay_groups(module: nn.Module, weight_decay: float, rates: Mapping[str, float] | None = None) -> list[dict[str, object]]:
    """AdamW parameter groups: weight decay on matrices, none on norms, biases and scales (all of them below two dimensions).

    rates: prefix of parameters' names -> their learning rate as a multiple of the others'; the first prefix that fits counts.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            factor = next((factor for prefix, factor in (rates or {}).items() if name.startswith(prefix)), 1.0)
            groups.setdefault((factor, parameter.ndim < 2), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if small else weight_decay, "lr_factor": factor}
        for (factor, small), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]
