"""Weights that open_clip itself asks a library for as it builds a tower: timm's of an image tower, transformers' of a text tower.

They are read with the library's own renaming and interpolation, into a second copy of the student of which only that tower is used, so
that what stays random is drawn as it would be without them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from megakd.models import clip, names, pretrained, transformers_tower
from megakd.models.matching import classifiers, errors_of
from megakd.models.start.files import TRANSFORMER
from megakd.models.start.parts import Opened, Outline, Tower, seen_otherwise
from megakd.models.weight_kinds import check_values
from megakd.models.weights import listed
from megakd.recipe import Model


@dataclass(frozen=True, eq=False)
class TimmTower:
    """timm's weights of the model that the image tower wraps, without its classifier. settings: "timm:NAME" with the tag."""

    key: str
    settings: Model
    towers: tuple[Tower, ...] = ("image",)

    @property
    def origin(self) -> str:
        return f"{self.settings.model} {self.settings.pretrained}"

    def is_here(self) -> bool:
        return pretrained.weights_file(self.settings, download=False) is not None

    def fetch(self) -> None:
        with errors_of(self.key):
            pretrained.weights_file(self.settings, download=True)

    def open(self, student: Outline) -> Opened:
        last = tuple(f"{names.TRUNK}{name}." for name in classifiers(student.model.visual.trunk))  # type: ignore[union-attr]
        given = tuple(name for name in student.names("image") if name.startswith(names.TRUNK) and not name.startswith(last))
        description = copy.deepcopy(student.description)
        name = (self.settings.model or "").removeprefix(pretrained.TIMM)
        description.config["vision_cfg"]["timm_model_name"] = f"{name}.{self.settings.pretrained}"
        cfg: Any = timm.get_pretrained_cfg(f"{name}.{self.settings.pretrained}")
        notes = seen_otherwise({"mean": cfg.mean, "std": cfg.std}, student.description)
        return Opened(given, _reader(lambda: clip.with_library_weights(description, image=True), self.key), tuple(notes))


@dataclass(frozen=True, eq=False)
class TransformersTower:
    """transformers' weights of the text tower's model, `text_cfg.hf_model_name`. name: a folder, or a repository of the hub."""

    key: str
    name: str
    towers: tuple[Tower, ...] = ("text",)

    @property
    def origin(self) -> str:
        return self.name

    def is_here(self) -> bool:
        return transformers_tower.is_folder(self.name) or transformers_tower.weights_file(self.name, download=False) is not None

    def fetch(self) -> None:
        with errors_of(self.key):
            if not transformers_tower.is_folder(self.name):
                transformers_tower.weights_file(self.name, download=True)

    def open(self, student: Outline) -> Opened:
        """Weights that lack a part of the tower, which transformers would draw with a warning alone, are refused as they are read."""
        if transformers_tower.is_folder(self.name) and pretrained.in_folder(Path(self.name)) is None:
            raise ValueError(f"{self.key}: {self.name} is a folder without weights (model.safetensors); save the model's in it")
        given = [name for name in student.names("text") if name.startswith(TRANSFORMER)]
        pooled = any(name.startswith(f"{TRANSFORMER}pooler.") for name in given)

        def build() -> nn.Module:
            if absent := _missing(self.name, pooled=pooled):
                raise ValueError(f"{self.name} has no {listed(absent)}, which the text tower has; name a model that has, or another pooler")
            return clip.with_library_weights(student.description, text=True)

        return Opened(tuple(given), _reader(build, self.key))


def _missing(name: str, *, pooled: bool) -> list[str]:
    """What transformers does not find of the model as open_clip asks for it."""
    try:
        encodes = {} if AutoConfig.from_pretrained(name).is_encoder_decoder else {"add_pooling_layer": pooled}
        _, info = AutoModel.from_pretrained(name, output_loading_info=True, **encodes)
    except Exception as error:  # transformers raises whatever its layers do
        raise ValueError(f"{name}: transformers gives no model ({type(error).__name__}: {error})") from error
    return sorted(info["missing_keys"])


def _reader(build: Callable[[], nn.Module], key: str) -> Callable[[str], Tensor]:
    """Reads from a model that is built when the first value is asked for."""

    @functools.cache
    def state() -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]), errors_of(key):
            return build().state_dict()

    def read(name: str) -> Tensor:
        tensor = state()[name]
        check_values(name, tensor, key)
        return tensor

    return read
