"""Names of parts of a student, as `student.freeze`, `optim.rates` and `optim.decays` give them.

    image, text                      a tower
    image.embeddings                 what comes before its blocks: patches or words, positions, class and register tokens
    image.blocks, image.blocks.0-5   its blocks, or some of them, both ends inside; 0 is the first. A convolutional tower's are its stages
    image.head                       what follows them: the last norm, the pooling, the projection to the embedding
    scale                            logit scale and bias
    heads, heads.NAME                what objectives train beside the towers

Where a parameter is in a model is found by `models/places.py`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megakd.recipe import texts

EMBEDDINGS, BLOCKS, HEAD = "embeddings", "blocks", "head"
IMAGE, TEXT, SCALE, HEADS = "image", "text", "scale", "heads"
_OF_A_TOWER = (EMBEDDINGS, BLOCKS, f"{BLOCKS}.0-5", HEAD)
_KNOWN = (IMAGE, TEXT, *(f"{tower}.{part}" for tower in (IMAGE, TEXT) for part in _OF_A_TOWER), SCALE, HEADS)
_OWN_HEAD = re.compile(r"heads\.[A-Za-z0-9_-]+")
_OF_ANSWERS = ("decoder", "projector", "lora")
_RANGE = re.compile(r"(image|text)\.blocks\.(\d{1,4})(?:-(\d{1,4}))?")


@dataclass(frozen=True)
class Place:
    """Where one parameter is. part: EMBEDDINGS, BLOCKS or HEAD of a tower, the name of a head of HEADS, "" of SCALE. block: of BLOCKS."""

    tower: str
    part: str = ""
    block: int = 0


@dataclass(frozen=True)
class Part:
    """What a name stands for. part: as in `Place`; "" for all of a tower. first, last: of a range of blocks, both inside."""

    name: str
    tower: str
    part: str = ""
    first: int | None = None
    last: int | None = None

    @classmethod
    def read(cls, key: str, name: str) -> Part:
        """Raises ValueError, beginning with `key`, for what names no part."""
        if found := _RANGE.fullmatch(name):
            first, last = int(found[2]), int(found[3] or found[2])
            if first > last:
                raise ValueError(f"{key}: a range of blocks begins with the lower number: write {found[1]}.blocks.{last}-{first}")
            return cls(name, found[1], BLOCKS, first, last)
        tower, _, part = name.partition(".")
        if _OWN_HEAD.fullmatch(name):
            return cls(name, tower, part)
        if tower in _OF_ANSWERS:
            raise ValueError(f"{key}: of a decoder decoder.adapt says what learns, and answers.lr how fast; take it out")
        if name not in _KNOWN:
            raise ValueError(f"{key}: no part of a student; {texts.did_you_mean(name, _KNOWN)}known are {', '.join(_KNOWN)}, heads.NAME")
        return cls(name, tower, part)

    @property
    def breadth(self) -> int:
        """Of two names that hold a parameter the one with the lower number is meant."""
        return 2 if not self.part else 1 if self.first is None else 0

    def holds(self, place: Place) -> bool:
        if place.tower != self.tower or self.part not in ("", place.part):
            return False
        return self.first is None or self.last is None or self.first <= place.block <= self.last


def narrowest(parts: Sequence[Part], place: Place) -> Part | None:
    """The one that is meant for a parameter; None where none holds it."""
    return min((part for part in parts if part.holds(place)), key=lambda part: part.breadth, default=None)


def check_apart(key: str, parts: Sequence[Part]) -> None:
    """Raises ValueError for two ranges of one tower that share a block, of which neither is the narrower name."""
    ranges = sorted((part for part in parts if part.first is not None), key=lambda part: (part.tower, part.first))
    for before, after in itertools.pairwise(ranges):
        assert before.last is not None
        assert after.first is not None
        if before.tower == after.tower and after.first <= before.last:
            raise ValueError(f"{key}.{before.name} and {key}.{after.name} share a block: give each block one value")
