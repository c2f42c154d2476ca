"""Pictures of examples: small, and none that a browser would have to look for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TypeVar

from PIL import Image

from megakd.pages.texts import clean

SIDE, QUALITY = 176, 82  # pixels of the longer side at most; a picture is then about 6 kB
LONGEST_TEXT = 320  # characters of a caption, a question or an answer

T = TypeVar("T")


def small_jpeg(image: Image.Image) -> bytes:
    """A copy that fits a page."""
    copy = image.convert("RGB")
    copy.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    copy.save(written, format="JPEG", quality=QUALITY, optimize=True)
    return written.getvalue()


def short(text: str) -> str:
    """One line of a text, cut where it is long."""
    line = " ".join(clean(text).split())
    return line if len(line) <= LONGEST_TEXT else f"{line[: LONGEST_TEXT - 1]}…"


def spread(items: Sequence[T], number: int) -> list[T]:
    """At most so many of them, evenly spaced, the first and the last among them."""
    if len(items) <= number:
        return list(items)
    if number == 1:
        return [items[0]]
    return [items[round(place * (len(items) - 1) / (number - 1))] for place in range(number)]
