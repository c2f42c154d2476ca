"""A teacher that is whole on every rank, frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.models import clip
from megakd.models.embeddings import Embeddings
from megakd.models.student import encode_images, encode_texts
from megakd.runtime import precision


class ReplicatedTeacher:
    """The whole teacher on every rank, frozen and in evaluation mode."""

    def __init__(self, built: clip.ClipModel) -> None:
        self.towers = built
        self._clip = built.clip.eval().requires_grad_(False)
        self._scale = self._clip.logit_scale.detach().float().exp().reshape(())  # type: ignore[operator, union-attr]
        bias = getattr(self._clip, "logit_bias", None)
        self._bias = None if bias is None else bias.detach().float().reshape(())
        self.dtype = built.dtype

    @property
    def width(self) -> int:
        return self.towers.description.width

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, D) unit rows, without gradient."""
        return encode_images(self._clip, pixels)

    def embed(self, pixels: Tensor, tokens: Tensor) -> Embeddings:
        return Embeddings(self.embed_images(pixels), encode_texts(self._clip, tokens), self._scale, self._bias)


def build_teacher(description: clip.ModelSpec, device: torch.device) -> ReplicatedTeacher:
    """The teacher of a recipe with its weights loaded. Raises ValueError as `clip.build` does."""
    return ReplicatedTeacher(clip.build(description, device, precision.of(device)))
