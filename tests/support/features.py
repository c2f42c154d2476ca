"""Random embeddings with patch tokens, for objectives that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.models.embeddings import Embeddings


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embeddings_with(**features: Tensor) -> Embeddings:
    """Of three pairs. features: with "__" for the point in a name."""
    named = {name.replace("__", "."): value for name, value in features.items()}
    return Embeddings(draw(1, 3, 4), draw(2, 3, 4), torch.tensor(1.0), features=named)
