"""A teacher whose towers are spread over the ranks by ZeRO-3, in int8 or in 16 bits: for those that one GPU cannot hold.

Each tower is a DeepSpeed engine of its own, beside the student's. Its weights are in no checkpoint: the student's engine does not know
of them.
"""

from __future__ import annotations

import math
from typing import Any, Self, final

from open_clip import CLIP
from torch import Tensor, nn

from megakd.models import clip, streaming
from megakd.models.heads import normalised
from megakd.recipe import Teacher as Settings
from megakd.runtime import precision, wire, zero3
from megakd.runtime.gathered import Gathered
from megakd.runtime.launch import World
from megakd.runtime.zero3 import Partitioned, Partitioner
from megakd.teachers.base import LiveTeacher, TeacherMemory, TeacherShape, TowerForm, settings_of


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
        self._encode = type(clip).encode_text  # type: ignore[attr-defined]  # CLIP's, or that of `models.text_padding`

    def forward(self, tokens: Tensor) -> Tensor:
        return self._encode(self, tokens)  # type: ignore[no-any-return]


@final
class ShardedTeacher(LiveTeacher):
    """Each rank holds its share of both towers, or of the image tower alone, and gathers block by block."""

    gathers = True

    def __init__(self, built: clip.ClipModel, image: Partitioned, text: Partitioned | None) -> None:
        super().__init__(built)
        self._image, self._text = image, text

    @classmethod
    def check(cls, settings: Settings) -> None:
        zero3.settings(settings.ds_config, offload=settings.offload)

    @classmethod
    def load(
        cls,
        description: clip.ModelSpec,
        world: World,
        int8: streaming.Int8 | None = None,
        *,
        without_text: bool = False,
        config: dict[str, Any] | None = None,
    ) -> Self:
        """As `LiveTeacher.load`. config: from `zero3.settings`; default: as the recipe says."""
        if "multimodal_cfg" in description.config:
            raise ValueError(f"{description.role}: a CoCa model's towers cannot be partitioned; set teacher.mode to a replicated one")
        if config is None:
            settings = settings_of(description)
            config = zero3.settings(settings.ds_config, offload=settings.offload)
        place = Partitioner(config, world).partition
        built = streaming.load(description, world, precision.of(world.device), int8=int8, place=place, without_text=without_text)
        model: Any = built.clip
        text = None
        if without_text:
            _forget_text(model)
        elif description.has_text:
            text = Partitioned(text_tower(model), config)
        return cls(built, Partitioned(model.visual, config), text)

    @classmethod
    def memory(cls, shape: TeacherShape) -> TeacherMemory:
        """What a partitioned tower gathers at most, as counted on DeepSpeed 0.19.8: it fetches ahead until `live` parameters are there, and
        what has arrived lies in a flat buffer beside the weights copied out of it. A bucket smaller than a block never gets far ahead.
        """

        def gathered(tower: TowerForm) -> int:
            ahead = shape.element * (shape.prefetch + 2 * tower.largest)
            reached = shape.element * shape.prefetch >= tower.block
            return max(ahead + (shape.element * shape.live if reached else 2 * tower.block), tower.single)

        total, kept = sum(one.bytes for one in shape.towers), sum(one.kept for one in shape.towers)
        share = math.ceil((total - kept) / shape.ranks)
        return TeacherMemory(
            weights=kept + (0 if shape.offload else share),
            host=share if shape.offload else 0,
            gathered=min(2 * total, max(map(gathered, shape.towers))),
            activations=max(one.activations for one in shape.towers),
            wire=wire.gathered(total - kept, shape.ranks, sum(one.sets for one in shape.towers)),
        )

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters that this rank holds between two steps."""
        return sum(tower.resident_bytes for tower in (self._image, self._text) if tower is not None)

    def gathered(self) -> Gathered:
        return Gathered.of(tower.gathered.taken() for tower in (self._image, self._text) if tower is not None)

    def embed_images(self, pixels: Tensor) -> Tensor:
        return normalised(self._image(pixels))

    def embed_texts(self, tokens: Tensor) -> Tensor:
        assert self._text is not None, "this teacher was built without a text tower"
        return normalised(self._text(tokens))


def text_tower(model: Any) -> nn.Module:
    """The text side of an open_clip model as one module."""
    return TextTower(model) if isinstance(model, CLIP) else model.text


def _forget_text(clip: nn.Module) -> None:
    """What is left of the tower is empty; nothing shall mistake it for a model."""
    for name, _ in [*clip.named_children(), *clip.named_parameters(recurse=False), *clip.named_buffers(recurse=False)]:
        if name != "visual" and name not in streaming.SCALARS:
            delattr(clip, name)
