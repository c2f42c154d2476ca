"""A student's tensors by tower, and what a source of weights is for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from megakd.models.casts import SCALARS
from megakd.models.clip import ModelSpec, on_meta
from megakd.models.preprocessing import complete
from megakd.models.weights import Shape

Tower = Literal["image", "text"]
VISUAL, TEXT = "visual.", "text."


@dataclass(frozen=True, eq=False)
class Outline:
    """A model's towers without weights. shapes: of its whole state."""

    description: ModelSpec
    model: nn.Module
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, description: ModelSpec) -> Outline:
        with torch.random.fork_rng(devices=[]):
            model = on_meta(description).clip
        return cls(description, model, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})

    def names(self, tower: Tower) -> list[str]:
        """Of a tower's tensors, without scale, bias and a decoder's of captions."""
        return [name for name in self.shapes if tower_of(name) == tower]


def tower_of(name: str) -> Tower | None:
    if name.startswith(VISUAL):
        return "image"
    return None if name in SCALARS or name.startswith("text_decoder.") else "text"


def is_projection(name: str, classifiers: tuple[str, ...] = ()) -> bool:
    """Whether a tensor only maps a tower's output to the joint embedding: it is of one width, and may be new where weights are not."""
    layers = ("visual.proj", "visual.head", "text_projection", "text.text_projection", "text.proj", *classifiers)
    return name.startswith(tuple(f"{layer}." for layer in layers)) or name in layers


@dataclass(frozen=True)
class Opened:
    """Weights that fit a student. names: of its tensors; read: the value of one, in its shape, one at a time. notes: for people."""

    names: tuple[str, ...]
    read: Callable[[str], Tensor]
    notes: tuple[str, ...] = ()


def seen_otherwise(theirs: Mapping[str, Any], student: ModelSpec) -> list[str]:
    """A note where weights were trained on images of another mean and std than the student's, which works, and costs accuracy.

    theirs: as open_clip's preprocess_cfg, of which what is left out is open_clip's default.
    """
    own = asdict(complete(student.preprocess, student.config))
    known = {key: theirs.get(key) or getattr(PreprocessCfg(), key) for key in ("mean", "std")}
    if all(tuple(known[key]) == tuple(own[key]) for key in known):
        return []
    mean, std = (", ".join(f"{number:.4g}" for number in numbers) for numbers in known.values())
    return [f"trained on images of mean ({mean}) and std ({std}), other than the student's: student.preprocess gives it the same"]


class Source(Protocol):
    """Weights for a part of a student. key: of the recipe, with its value. towers: those that it is for."""

    @property
    def key(self) -> str: ...

    @property
    def origin(self) -> str: ...

    @property
    def towers(self) -> tuple[Tower, ...]: ...

    def is_here(self) -> bool:
        """Whether the weights are on this machine."""
        ...

    def fetch(self) -> None:
        """Bring them onto this machine. Raises ValueError, naming the key, where nothing comes."""
        ...

    def open(self, student: Outline) -> Opened:
        """Of weights that are here; no value is read. Raises ValueError, naming the key, where they are not of the student's kind."""
        ...
