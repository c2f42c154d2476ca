"""AdamW's groups of a module that is no student, for tests of the engine."""

from __future__ import annotations

from typing import Any

from torch import nn

from megakd.recipe import Optim
from megakd.training.learning import paces
from megakd.training.optim import parameter_groups


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """As a run without rates or decays of its parts has them."""
    student: Any = module
    return parameter_groups(module, paces(student, Optim(steps=1, batch=1, lr=1.0, weight_decay=weight_decay), {}))
