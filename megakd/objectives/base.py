"""The contract of an objective: embeddings in, its losses out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings
from megakd.recipe import Recipe
from megakd_kernels import choose


class Objective(Protocol):
    """Losses over a batch that share their work. It holds no rank and makes no collective; what spans ranks is in `megakd_kernels`.

    names: keys of the recipe's `[objectives]` that it computes.
    backend: which implementation of `megakd_kernels` it calls; None where it calls none.
    """

    names: tuple[str, ...]
    backend: str | None

    def head(self, student_width: int, teacher_width: int) -> nn.Module | None:
        """A projection to train inside the engine, one for each teacher; outputs come back by their `head_name`. None for none."""
        ...

    def __call__(self, student: Embeddings, teachers: Sequence[Embeddings], group: ProcessGroup | None) -> dict[str, Tensor]:
        """Each of `names` as a float32 scalar whose gradient, averaged over ranks, is that of the global batch; the teachers' mean."""
        ...


def head_name(objective: str, place: int) -> str:
    """The key in `student.projected` of an objective's projection to the teacher at `place` (from 0)."""
    return objective if place == 0 else f"{objective}{place}"


class KernelOptions(TypedDict):
    """The arguments of `megakd_kernels`' losses that say how to compute them, not what."""

    backend: str
    ring: bool


def kernel_options(recipe: Recipe, loss: str, device: torch.device) -> KernelOptions:
    """`[kernels]` of the recipe with "auto" resolved for a loss of `megakd_kernels` over the recipe's global batch.

    Raises ValueError naming the key where the forced backend cannot run on this device.
    """
    asked: dict[str, Any] = {"backend": recipe.kernels.backend, "ring": recipe.kernels.ring}
    try:
        return KernelOptions(backend=choose(loss, recipe.optim.batch, device, torch.float32, **asked), ring=recipe.kernels.ring)
    except ValueError as error:
        raise ValueError(f"kernels.backend = {recipe.kernels.backend!r}: {error}") from error
