"""The contract between models and objectives: embeddings are all that an objective sees of a model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Legend: B local batch, D embedding width.


class Embeddings(NamedTuple):
    """A batch of image-text pairs as one model sees them.

    image, text: (B, D), L2-normalised. scale: (), multiplies the cosine ("temperature" would divide).
    bias: (), added to the logits by sigmoid-trained models (SigLIP), otherwise None.
    projected: outputs of the objectives' trained heads by objective name, each (image, text) in the teacher's width; empty for a teacher.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None = None
    projected: dict[str, tuple[Tensor, Tensor]] = {}  # noqa: RUF012  (NamedTuple default; never mutated)
