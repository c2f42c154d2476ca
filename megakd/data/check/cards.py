"""Samples as the page shows them: a thumbnail inside the page, and the caption as text in which nothing is hidden."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from megakd.data.bad_samples import OF_CAPTIONS, BadSample
from megakd.data.check.summary import Summary, caption_at
from megakd.data.shards import ShardSet
from megakd.data.transforms import rgb_image

_SHEET = 48  # samples of the contact sheet
_SIDE = 160  # pixels of a thumbnail
_LONGEST = 240  # characters that are shown of a text
_MOST_BYTES = 2_200_000  # of all thumbnails as text: the page stays below 3 MB
_OF_CAPTIONS = (*OF_CAPTIONS, "bad_text")  # the image may be sound


@dataclass(frozen=True)
class Card:
    """source: a data: URI, None where there is no image to show. notes: facts that the card is there for."""

    where: str
    text: str | None
    source: str | None
    size: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardGroup:
    title: str
    caption: str
    cards: tuple[Card, ...]


@dataclass
class CardMaker:
    """Reads samples once more, in this process. room: bytes of all thumbnails as text; left_out: those that there was no room for."""

    shards: ShardSet
    captions: bool
    room: int = _MOST_BYTES
    left_out: int = 0
    _bytes: int = 0
    _cards: dict[int, Card] = field(default_factory=dict)

    def card(self, index: int, *notes: str) -> Card:
        if index not in self._cards:
            try:
                sample = self.shards.read(index, ("image",))
                text = caption_at(self.shards, index) if self.captions else None
                image = rgb_image(sample.members["image"], self.shards.data)
                self._cards[index] = Card(sample.where, None if text is None else shown_text(text), _source(image), _size(image))
            except BadSample as bad:  # it was read a moment ago
                self._cards[index] = Card(self.shards.where(index), None, None, shown_text(str(bad)))
        made = self._cards[index]
        return Card(made.where, made.text, self._with_room(made.source), made.size, notes)

    def dropped(self, index: int, bad: BadSample) -> Card:
        """A sample that cannot be used, with its image where only the caption is at fault."""
        image = None
        if bad.reason in _OF_CAPTIONS:
            try:
                image = rgb_image(self.shards.read(index, ("image",)).members["image"], self.shards.data)
            except BadSample:
                image = None
        source, size = (None, "") if image is None else (self._with_room(_source(image)), _size(image))
        return Card(self.shards.where(index), None, source, size, (f"{bad.reason}: {shown_text(bad.detail)}",))

    def _with_room(self, source: str | None) -> str | None:
        """The thumbnail once more on the page, None where there is no room for it."""
        if source is not None and self._bytes + len(source) > self.room:
            self.left_out += 1
            return None
        self._bytes += len(source or "")
        return source


def groups(maker: CardMaker, summary: Summary, unusable: list[tuple[int, BadSample]]) -> tuple[list[CardGroup], CardGroup | None]:
    """(what is remarkable, the contact sheet, None where nothing can be used)."""
    found = [
        CardGroup("Dropped", "Some of each reason, with all that can be shown of them.", tuple(maker.dropped(*one) for one in unusable))
    ]
    for kind, what in (("images", "image"), ("captions", "caption")):
        repeats = summary.repeats.get(kind)
        for equal in () if repeats is None else repeats.groups:
            title = f"The same {what}, {equal.count:,} times"
            found.append(CardGroup(title, "", tuple(maker.card(index) for index in equal.members)))
    for name, indices in summary.extremes.items():
        what = "captions" if name in ("longest", "shortest") else "images"
        found.append(CardGroup(f"{name.capitalize()} {what}", "", tuple(maker.card(index) for index in indices)))
    usable = summary.usable_N
    chosen = usable[np.arange(min(_SHEET, len(usable))) * len(usable) // max(1, min(_SHEET, len(usable)))]
    sheet = CardGroup(
        "Contact sheet",
        f"{len(chosen)} of {len(usable):,} samples that a run would train on, evenly spaced in the order of the shards.",
        tuple(maker.card(int(index)) for index in chosen),
    )
    return [group for group in found if group.cards], sheet if sheet.cards else None


def shown_text(text: str) -> str:
    """The beginning of a text; what is not printable, such as marks that reverse its direction, by its escape."""
    start = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text[:_LONGEST])
    return start if len(text) <= _LONGEST else f"{start} … ({len(text):,} characters)"


def _source(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE), reducing_gap=3.0)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=70, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"
