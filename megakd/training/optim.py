"""What AdamW is given: its parameter groups and, step by step, its learning rate, a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from megakd.recipe import Optim
from megakd.recipe.parts import BLOCKS, EMBEDDINGS, Place


def learning_rate(optim: Optim, step: int) -> float:
    """Learning rate of the update number `step` (from 0): linear warm-up, then cosine to final_lr * lr, constant, or stable until the
    cooldown to final_lr * lr. Like the cosine's, the cooldown's first update still has lr, and the update behind the last would have its
    final rate."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "wsd":
        done = max(0, step - (optim.steps - optim.cooldown)) / optim.cooldown
        left = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "sqrt": 1 - math.sqrt(done)}[optim.cooldown_shape]
        return optim.lr * (optim.final_lr + (1 - optim.final_lr) * left)
    done = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Pace:
    """How one parameter learns. factor: its rate as a multiple of the recipe's. decay: its weight decay."""

    factor: float
    decay: float


def parameter_groups(module: nn.Module, pace: Callable[[str, nn.Parameter], Pace]) -> list[dict[str, object]]:
    """AdamW's groups of what is trained, one for all parameters of equal pace; those below two dimensions apart."""
    groups: dict[tuple[float, bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            own = pace(name, parameter)
            groups.setdefault((own.factor, parameter.ndim < 2, own.decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_factor": factor}
        for (factor, _, decay), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def layer_factor(place: Place, blocks: int, decay: float) -> float:
    """Of a parameter's rate, in a tower of so many blocks: 1 in the head, `decay` in the last block, its power of blocks + 1 in the
    embeddings. Source: BEiT's fine-tuning (arXiv 2106.08254)."""
    below = {EMBEDDINGS: blocks + 1, BLOCKS: blocks - place.block}.get(place.part, 0)
    return decay**below
