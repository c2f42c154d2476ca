"""What the trainer and the objectives need of a teacher, and what a live one is beside that: loaded, placed, and counted by `megakd plan`.

`replicated` and `sharded` are live, `cached` reads a store; `build` chooses by the recipe. How to add another: README.md of this folder.
Legend: B local batch, D embedding width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from megakd.data.caption_tokens import Tokenize, plain_captions
from megakd.models import clip, streaming
from megakd.models.embeddings import Embeddings
from megakd.models.grids import averaged
from megakd.models.patches import Read, TowerReader, feature_name
from megakd.recipe import Teacher as Settings
from megakd.runtime.gathered import Gathered
from megakd.runtime.launch import World
from megakd.runtime.wire import Wire


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

    def embed(self, pixels: Tensor, tokens: Tensor, blocks: Collection[Read] = ()) -> Embeddings:
        """Unit embeddings of a batch, without gradient. Every rank calls it equally often: a sharded teacher communicates in it.

        blocks: of the vision tower, whose patch tokens or attention are among the features; nothing else is kept.
        """
        ...

    def gathered(self) -> Gathered | None:
        """What forwards have gathered since the last call; None where nothing is partitioned."""
        ...


@dataclass(frozen=True)
class TowerForm:
    """One tower in one precision. bytes: of its parameters and buffers as they lie in memory; activations: most that a forward of B holds.

    kept: bytes that ZeRO-3 does not partition: buffers, the scales of int8 rows among them, and small parameters.
    block: bytes of the largest set of several parameters that ZeRO-3 gathers together; single: of the largest gathered alone.
    largest: elements of the largest parameter in such a set. sets: how many there are that it gathers.
    """

    numel: int
    bytes: int
    activations: int
    kept: int
    block: int
    single: int
    largest: int
    sets: int


@dataclass(frozen=True)
class TeacherShape:
    """What a teacher's memory depends on. towers: those that are loaded; element: bytes of a number of their matrices.

    prefetch, live: ZeRO-3's elements that are fetched ahead, and that are there at once.
    """

    towers: list[TowerForm]
    ranks: int
    element: int
    offload: bool
    prefetch: int
    live: int


@dataclass(frozen=True)
class TeacherMemory:
    """Bytes of one rank. weights: on the device between steps; host: in the CPU's memory, read in each forward.

    gathered: weights that are on the device while it runs alone; activations: most of a forward. wire: what is sent in a forward.
    """

    weights: int = 0
    host: int = 0
    gathered: int = 0
    activations: int = 0
    wire: Wire = field(default_factory=Wire)


class LiveTeacher(ABC):
    """A frozen model in evaluation mode, its weights placed in one way. Implements `Teacher`; a placement is a subclass.

    Every rank calls its methods equally often, with batches of any size. gathers: whether ranks talk in them.
    """

    gathers: ClassVar[bool] = False

    def __init__(self, built: clip.ClipModel) -> None:
        self.towers, self.dtype = built, built.dtype
        model: Any = built.clip
        self.has_text = built.description.has_text
        # Of images alone there are no logits, and a loss that asks for them all the same ends the run as not finite.
        nothing = torch.tensor(math.nan)
        self.scale = model.logit_scale.detach().float().exp().reshape(()) if self.has_text else nothing
        bias = getattr(model, "logit_bias", None)
        self.bias = None if bias is None else bias.detach().float().reshape(())

    @classmethod
    def check(cls, settings: Settings) -> None:
        """Before anything is loaded. Raises ValueError for settings that this placement cannot use."""
        del settings

    @classmethod
    @abstractmethod
    def load(cls, description: clip.ModelSpec, world: World, int8: streaming.Int8 | None = None, *, without_text: bool = False) -> Self:
        """The teacher with its weights: a collective. In 8 bit where `int8` says how, else as `precision.of` says.

        without_text: for images alone; no weight of the text tower is read. Raises ValueError on every rank as `streaming.load` does.
        """

    @classmethod
    @abstractmethod
    def memory(cls, shape: TeacherShape) -> TeacherMemory:
        """For `megakd plan`."""

    @property
    def width(self) -> int:
        return self.towers.description.width

    def gathered(self) -> Gathered | None:
        return None

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, D) unit rows, without gradient."""

    @abstractmethod
    def embed_texts(self, tokens: Tensor) -> Tensor:
        """(B, D) unit rows, without gradient. Not called of a teacher without a text tower."""

    def embed(self, pixels: Tensor, tokens: Tensor, blocks: Collection[Read] = ()) -> Embeddings:
        image_BD, features = self.see(pixels, blocks)
        text_BD = self.embed_texts(tokens) if self.has_text else image_BD[:, :0]
        return Embeddings(image_BD, text_BD, self.scale, self.bias, features=features)

    def see(self, pixels: Tensor, blocks: Collection[Read]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `embed_images`, with what is read of `blocks`, as `Embeddings.features` has them; on `patch_grid` where it is given."""
        with TowerReader(getattr(self.towers.clip, "visual", None), blocks) as reader:
            image_BD = self.embed_images(pixels)
        grid = settings_of(self.towers.description).patch_grid if blocks else None
        return image_BD, {feature_name(block): averaged(map_BhwC, grid) for block, map_BhwC in reader.maps(image_BD).items()}


def padded(description: clip.ModelSpec) -> Tokenize:
    """A model's tokenizer as batches are read with it: special tokens in a caption are words, and texts end as `text_padding` says."""
    return description.padded(plain_captions(description.tokenize))


def settings_of(description: clip.ModelSpec) -> Settings:
    assert isinstance(description.settings, Settings), "described from [teacher] or [ensemble] of a recipe"
    return description.settings
