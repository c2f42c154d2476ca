"""A teacher that is whole on every rank."""

from __future__ import annotations

from typing import Self, final

from torch import Tensor

from megakd.models import clip, streaming
from megakd.models.student import encode_images, encode_texts
from megakd.runtime import precision
from megakd.runtime.launch import World
from megakd.teachers.base import LiveTeacher, TeacherMemory, TeacherShape


@final
class ReplicatedTeacher(LiveTeacher):
    """The whole teacher on every rank."""

    def __init__(self, built: clip.ClipModel) -> None:
        super().__init__(built)
        self._clip = built.clip.eval().requires_grad_(False)

    @classmethod
    def load(cls, description: clip.ModelSpec, world: World, int8: streaming.Int8 | None = None, *, without_text: bool = False) -> Self:
        if int8 is None and not without_text:
            return cls(clip.build(description, world.device, precision.of(world.device)))
        return cls(streaming.load(description, world, precision.of(world.device), int8=int8, without_text=without_text))

    @classmethod
    def memory(cls, shape: TeacherShape) -> TeacherMemory:
        towers = shape.towers
        return TeacherMemory(weights=sum(one.bytes for one in towers), activations=max(one.activations for one in towers))

    def embed_images(self, pixels: Tensor) -> Tensor:
        return encode_images(self._clip, pixels)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        return encode_texts(self._clip, tokens)
