"""A whole open_clip model that gives a part of its weights: the teacher its text tower, and the model that a student inherits from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from megakd.models import pretrained
from megakd.models.clip import ModelSpec
from megakd.models.matching import Match, errors_of
from megakd.models.start.parts import TEXT, Opened, Outline, Tower
from megakd.models.weights import in_memory, open_weights
from megakd.recipe import Model


class Donor:
    """A model whose weights are read one tensor at a time, in its own shapes. key: of the recipe.

    description: the same model's, as the recipe that is about to train it has it where its folder is not there yet.
    Raises ValueError, naming the key, for a model without weights.
    """

    def __init__(self, key: str, settings: Model, description: ModelSpec) -> None:
        self.key, self.settings, self.description = key, settings, description
        if pretrained.is_random(settings):
            raise ValueError(f"{key}: {self.origin} has random weights, and nothing to give; name its weights")

    @property
    def origin(self) -> str:
        return " ".join(part for part in (self.settings.model or "an architecture", self.settings.pretrained) if part)

    @functools.cached_property
    def outline(self) -> Outline:
        return Outline.of(self.description)

    def _file(self) -> Path | None:
        name = self.settings.model or ""
        if name.startswith(pretrained.LOCAL) and not Path(name.removeprefix(pretrained.LOCAL)).is_dir():
            return None  # another recipe is about to write it
        return pretrained.weights_file(self.settings, download=False)

    def is_here(self) -> bool:
        return self._file() is not None

    def fetch(self) -> None:
        with errors_of(self.key):
            pretrained.weights_file(self.settings, download=True)

    def check(self) -> None:
        """Raises ValueError where its file is not of its architecture; nothing is read but names and shapes."""
        file = self._file()
        assert file is not None
        with errors_of(self.key):
            self._of(in_memory(file, mapped=True))

    @functools.cached_property
    def weights(self) -> Match:
        """From safetensors, a pickled file through its conversion: no more than a tensor is ever in memory."""
        file = self._file()
        assert file is not None
        with errors_of(self.key):
            return self._of(open_weights(file))

    def _of(self, weights: Any) -> Match:
        return Match(self.description.role, self.description.config, self.outline.model, self.outline.shapes, weights)


class FromDonor:
    """What is asked of every source of weights, and is the donor's to answer where one has them all."""

    def __init__(self, donor: Donor) -> None:
        self.donor, self.key = donor, donor.key

    @property
    def origin(self) -> str:
        return self.donor.origin

    def is_here(self) -> bool:
        return self.donor.is_here()

    def fetch(self) -> None:
        self.donor.fetch()


class TeachersText(FromDonor):
    """The text tower of a teacher, for a student whose configuration is `architecture.with_text_of`."""

    towers: tuple[Tower, ...] = ("text",)

    def open(self, student: Outline) -> Opened:
        self.donor.check()
        theirs = {canonical(name): name for name in self.donor.outline.names("text")}
        ours = student.names("text")
        assert theirs.keys() == {canonical(name) for name in ours}, "its configuration is the teacher's"
        return Opened(tuple(ours), lambda name: self.donor.weights.read(theirs[canonical(name)]))


def canonical(name: str) -> str:
    """A text tower's tensor by its name in a tower alone: open_clip's older class of models has no prefix."""
    return name.removeprefix(TEXT)
