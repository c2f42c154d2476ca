"""What the losses of this package take and return.

Legend: B local rows (pairs on this rank), D embedding width.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Pair(Protocol):
    """Anything that carries one model's embeddings of B image-text pairs; row i of `image` belongs to row i of `text`."""

    @property
    def image(self) -> Tensor:
        """(B, D), L2-normalised by the caller."""

    @property
    def text(self) -> Tensor:
        """(B, D), L2-normalised by the caller."""

    @property
    def scale(self) -> Tensor:
        """() or (1,), multiplies the cosine ("temperature" would divide)."""


class SimilarityLoss(NamedTuple):
    """Two scalars over the same similarity matrix; a part that was not asked for is 0 without a gradient."""

    kd: Tensor
    hard: Tensor


class Towers(NamedTuple):
    """A `Pair` past the door: checked, contiguous, `scale` of shape (). What the backends receive."""

    image: Tensor
    text: Tensor
    scale: Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, otherwise float32: logits and statistics are never kept in half precision."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
