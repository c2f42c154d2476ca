"""What the trainer and the objectives need of a teacher, wherever its weights lie.

Implemented by `replicated`, `sharded` and `cached`; `build` chooses by the recipe. How to add another: README.md of this folder.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megakd.models.embeddings import Embeddings


class Teacher(Protocol):
    """What the trainer and the objectives need of a teacher."""

    @property
    def width(self) -> int:
        """Width D of its embeddings."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the pixels that `embed` takes."""
        ...

    def embed(self, pixels: Tensor, tokens: Tensor) -> Embeddings:
        """Unit embeddings of a batch, without gradient. Every rank calls it equally often: a sharded teacher communicates in it."""
        ...
