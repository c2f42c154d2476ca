"""A teacher in the memory of each rank's host, whose blocks are on the device while they run: for one GPU, without ZeRO."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from megakd.models import clip, streaming
from megakd.models.student import encode_images, encode_texts
from megakd.runtime import precision
from megakd.runtime.launch import World
from megakd.runtime.zero3 import gathered_together
from megakd.teachers.base import LiveTeacher, TeacherMemory, TeacherShape
from megakd.teachers.sharded import text_tower

BLOCK = 75_000_000  # elements that go to the device together, at most, but for a single layer


@final
class HostedTeacher(LiveTeacher):
    """Every rank's host holds the whole teacher."""

    def __init__(self, built: clip.ClipModel, device: torch.device) -> None:
        super().__init__(built)
        model: Any = built.clip
        self._clip, self._device, self._at_home = model.eval().requires_grad_(False), device, dict[nn.Parameter, Tensor]()
        blocks = [block for tower in (model.visual, text_tower(model)) for block in gathered_together(tower, BLOCK)]
        hosted = {parameter for block in blocks for parameter in block.parameters()}
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor not in hosted and not tensor.is_meta:  # of a text tower that was left out
                tensor.data = tensor.data.to(device)
        self.scale, self.bias = self.scale.to(device), None if self.bias is None else self.bias.to(device)
        for block in blocks:
            block.register_forward_pre_hook(self._fetch)
            block.register_forward_hook(self._send_home)

    def _fetch(self, block: nn.Module, *_: Any) -> None:
        for parameter in block.parameters():
            self._at_home[parameter] = parameter.data
            parameter.data = parameter.data.to(self._device, non_blocking=True)

    def _send_home(self, block: nn.Module, *_: Any) -> None:
        for parameter in block.parameters():
            parameter.data = self._at_home.pop(parameter)

    @classmethod
    def load(cls, description: clip.ModelSpec, world: World, int8: streaming.Int8 | None = None, *, without_text: bool = False) -> Self:
        host = dataclasses.replace(world, device=torch.device("cpu"))
        return cls(streaming.load(description, host, precision.of(world.device), int8=int8, without_text=without_text), world.device)

    @classmethod
    def memory(cls, shape: TeacherShape) -> TeacherMemory:
        towers = shape.towers
        kept = sum(one.kept for one in towers)
        return TeacherMemory(
            weights=kept,
            host=sum(one.bytes for one in towers) - kept,
            gathered=max(max(one.block, one.single) for one in towers),
            activations=max(one.activations for one in towers),
        )

    def embed_images(self, pixels: Tensor) -> Tensor:
        return encode_images(self._clip, pixels)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        return encode_texts(self._clip, tokens)
