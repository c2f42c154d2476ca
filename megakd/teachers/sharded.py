"""A teacher whose towers are spread over the ranks by ZeRO-3, in int8 or in 16 bits: for those that one GPU cannot hold.

Each tower is a DeepSpeed engine of its own, beside the student's. Its weights are in no checkpoint: the student's engine does not know
of them. Legend: B local batch, D embedding width.
"""

from __future__ import annotations

from typing import Any

from open_clip import CLIP
from torch import Tensor, nn

from megakd.models import clip, streaming
from megakd.models.embeddings import Embeddings
from megakd.models.student import normalised
from megakd.runtime import precision
from megakd.runtime.launch import World
from megakd.runtime.zero3 import Partitioned, Partitioner


class TextTower(nn.Module):
    """The text side of open_clip's `CLIP`, which has it spread over the model, as one module with one forward.

    The parts are the model's own; DeepSpeed gathers in hooks of `forward` alone, which `encode_text` of the model would pass by.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        text = [name for name, _ in clip.named_children() if name != "visual"]
        for name in text:
            setattr(self, name, getattr(clip, name))
        for name, parameter in clip.named_parameters(recurse=False):
            if name not in streaming.SCALARS:
                self.register_parameter(name, parameter)
        for name, buffer in clip.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=False)
        if clip.text_projection is None:
            self.text_projection = None
        self.text_pool_type, self.text_eos_id = clip.text_pool_type, clip.text_eos_id

    def forward(self, tokens: Tensor) -> Tensor:
        return CLIP.encode_text(self, tokens)  # type: ignore[no-any-return, arg-type]


class ShardedTeacher:
    """Implements `megakd.teachers.base.Teacher`. Every rank calls its methods equally often, with batches of any size."""

    def __init__(self, built: clip.ClipModel, image: Partitioned, text: Partitioned | None) -> None:
        self.towers, self._image, self._text = built, image, text
        clip: Any = built.clip
        self._scale = clip.logit_scale.detach().float().exp().reshape(())
        bias = getattr(clip, "logit_bias", None)
        self._bias = None if bias is None else bias.detach().float().reshape(())
        self.dtype = built.dtype

    @property
    def width(self) -> int:
        return self.towers.description.width

    @property
    def scale(self) -> Tensor:
        """The logit scale, (), float32."""
        return self._scale  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        return self._bias  # type: ignore[no-any-return]

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters that this rank holds between two steps."""
        return sum(tower.resident_bytes for tower in (self._image, self._text) if tower is not None)

    def embed(self, pixels: Tensor, tokens: Tensor) -> Embeddings:
        return Embeddings(self.embed_images(pixels), self.embed_texts(tokens), self._scale, self._bias)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, D) unit rows, without gradient."""
        return normalised(self._image(pixels))

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """(B, D) unit rows, without gradient."""
        assert self._text is not None, "this teacher was built without its text tower: its texts come from a store"
        return normalised(self._text(tokens))


def build_sharded_teacher(
    description: clip.ModelSpec,
    world: World,
    config: dict[str, Any],
    *,
    int8: streaming.Int8 | None = None,
    without_text: bool = False,
) -> ShardedTeacher:
    """The partitioned teacher of a recipe with its weights loaded: a collective.

    config: from `zero3.settings`. int8: None keeps bf16 or float32, as `precision.of` says. without_text: for images alone.
    Raises ValueError on every rank as `streaming.load` does.
    """
    if "multimodal_cfg" in description.config:
        raise ValueError(f"{description.role}: a CoCa model's towers cannot be partitioned; set teacher.mode to a replicated one")
    partitioner = Partitioner(config, world)
    built = streaming.load(
        description, world, precision.of(world.device), int8=int8, place=partitioner.partition, without_text=without_text
    )
    clip: Any = built.clip
    text = None
    if without_text:
        _forget_text(clip)
    else:
        text = Partitioned(TextTower(clip) if isinstance(clip, CLIP) else clip.text, config)
    return ShardedTeacher(built, Partitioned(clip.visual, config), text)


def _forget_text(clip: nn.Module) -> None:
    """What is left of the tower is empty; nothing shall mistake it for a model."""
    for name, _ in [*clip.named_children(), *clip.named_parameters(recurse=False), *clip.named_buffers(recurse=False)]:
        if name != "visual" and name not in streaming.SCALARS:
            delattr(clip, name)
