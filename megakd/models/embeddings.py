"""The contract between models and objectives: embeddings are all that an objective sees of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Legend: B local batch, D embedding width.


class Embeddings(NamedTuple):
    """A batch of image-text pairs as one model sees them.

    image, text: (B, D), L2-normalised; text is (B, 0) of a teacher that sees images alone, and its scale NaN.
    scale: (), multiplies the cosine ("temperature" would divide).
    bias: (), added to the logits by sigmoid-trained models (SigLIP), otherwise None.
    projected: outputs of the objectives' trained heads by objective name, each (image, text) in the teacher's width; empty for a teacher.
    features: with B rows each, where an objective reads more. Of a student its heads' other outputs, as HEAD.OUTPUT; of a teacher the
    patch tokens (B, h, w, C) of its blocks on their grid, or averaged to `teacher.patch_grid`, as "patches.BLOCK", and the attention of a
    block, (B, h, w, 1), as "attention.BLOCK".
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None = None
    projected: dict[str, tuple[Tensor, Tensor]] = {}  # noqa: RUF012  (NamedTuple default; never mutated)
    features: dict[str, Tensor] = {}  # noqa: RUF012

    @property
    def has_text(self) -> bool:
        return self.text.shape[1] > 0

    @classmethod
    def joined(cls, parts: Sequence[Embeddings]) -> Embeddings:
        """A teacher's embeddings of micro-batches as those of the whole batch."""
        first = parts[0]
        features = {name: torch.cat([part.features[name] for part in parts]) for name in first.features}
        image, text = torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts])
        return first._replace(image=image, text=text, features=features)
