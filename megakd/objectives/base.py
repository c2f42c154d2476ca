"""The contract of an objective: embeddings in, one scalar out."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megakd.models.embeddings import Embeddings


class Objective(Protocol):
    """A loss over a batch. It holds no rank and makes no collective; what spans ranks is a function of `megakd_kernels`."""

    needs_teacher: bool

    def head(self, student_width: int, teacher_width: int) -> nn.Module | None:
        """A projection to train inside the engine, whose outputs come back as `student.projected[name]`; None for none."""
        ...

    def __call__(self, student: Embeddings, teacher: Embeddings | None, group: ProcessGroup | None) -> Tensor:
        """A float32 scalar whose gradient, averaged over ranks, is that of the global batch."""
        ...
