"""Which caption of a sample is read: from its members to all its captions, and to the one of them that is drawn.

The captions of a sample have one order, by the names of their sources and then as they stand in their lists. A store of embeddings holds
them in it, and the number of the drawn one names its row.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megakd.data.bad_samples import BadSample
from megakd.data.caption_tokens import as_text, caption, is_blank
from megakd.data.sampler import uniform
from megakd.data.samples import Slot, slots_of
from megakd.recipe import Data, strict_json
from megakd.recipe.captions import CaptionSource, CleanStep, extension

_TAG = re.compile(r"(?:<|&lt;)/?[a-z][^<>&]{0,300}(?:>|&gt;)", re.IGNORECASE)
_ADDRESS = re.compile(r"(?:https?://|\bwww\.)\w\S*", re.IGNORECASE)


_JSON = {bool: "true or false", dict: "an object", list: "a list in a list"}


class Captions(NamedTuple):
    """All captions of a sample, at least one. source: of each, its number among the policy's."""

    texts: tuple[str, ...]
    source: tuple[int, ...]


@dataclass(frozen=True)
class CaptionPolicy:
    """Where captions are, in the order of the sources' names, and how often each is drawn. Cheap to pickle.

    shares: of the sources, together 1. clean: what is taken out of every text.
    """

    sources: tuple[CaptionSource, ...]
    shares: tuple[float, ...]
    clean: tuple[CleanStep, ...] = ()

    @classmethod
    def of(cls, data: Data) -> CaptionPolicy:
        """What is trained on."""
        of_source = data.caption_shares()
        return cls(tuple(of_source), tuple(of_source.values()), tuple(data.clean))

    @classmethod
    def member(cls, spelled: str) -> CaptionPolicy:
        """The whole text of one member, `data.caption`, as evaluation sets have it."""
        return cls((CaptionSource(extension(spelled)),), (1.0,))

    @functools.cached_property
    def members(self) -> tuple[str, ...]:
        """Extensions, those of plain text first."""
        return tuple(sorted({one.member for one in self.sources}, key=lambda name: (name.rpartition(".")[2] == "json", name)))

    @property
    def spelled_members(self) -> str:
        return " or ".join(f".{name}" for name in self.members)

    @functools.cached_property
    def slots(self) -> dict[str, Slot]:
        """Where the index of a tar has each member."""
        return slots_of(self.members)

    @functools.cached_property
    def needs(self) -> tuple[Slot, ...]:
        """The slots of the members."""
        return tuple(self.slots.values())

    @functools.cached_property
    def is_single(self) -> bool:
        """Whether every sample has one caption, the whole text of one member."""
        return len(self.sources) == 1 and self.sources[0].path is None and not self.sources[0].lines

    def to_json(self) -> dict[str, Any]:
        """For a store's manifest: what the embedding of a caption depends on, and which is drawn."""
        clean = {"clean": list(self.clean)} if self.clean else {}
        if self.is_single:
            return {"caption": self.sources[0].member, **clean}
        shares = {one.name: round(share, 9) for one, share in zip(self.sources, self.shares, strict=True)}
        return {"captions": shares, **clean}

    @property
    def stored(self) -> int | None:
        """`Layout.captions` of a store."""
        return None if self.is_single else len(self.sources)

    def __str__(self) -> str:
        """For people: the sources with their shares."""
        return ", ".join(f"{share:.3g} {one.name}" for one, share in zip(self.sources, self.shares, strict=True))

    def read(self, members: Mapping[Slot, bytes]) -> Captions:
        """The captions of a sample with these members.

        Raises BadSample: bad_text or bad_json for a member that is damaged, and without any caption missing_caption or empty_caption.
        """
        if self.is_single:
            text = self._cleaned(caption(members["caption"]))
            if self.clean and is_blank(text):
                raise BadSample("empty_caption", f"data.clean = {list(self.clean)} leaves nothing of it")
            return Captions((text,), (0,))
        found = self.by_source(members)
        texts = [text for of_source in found for text in of_source or ()]
        if not texts:
            blank = any(of_source is not None for of_source in found)
            raise BadSample("empty_caption" if blank else "missing_caption", f"no text in {', '.join(one.name for one in self.sources)}")
        return Captions(tuple(texts), tuple(number for number, of_source in enumerate(found) for _ in of_source or ()))

    def by_source(self, members: Mapping[Slot, bytes]) -> list[list[str] | None]:
        """Of each source the captions that say something; None where the sample does not have the member or the field.

        Raises BadSample, bad_text or bad_json, for a member that is damaged.
        """
        values, found = dict[Slot, Any](), list[list[str] | None]()
        for one in self.sources:
            slot = self.slots[one.member]
            if slot not in values and members.get(slot):
                values[slot] = as_text(members[slot]) if one.path is None else json_of(members[slot], one)
            texts = [] if slot not in values else [values[slot]] if one.path is None else list(_fields(values[slot], one.path, one))
            lines = (line for text in texts for line in (text.splitlines() if one.lines else [text]))
            found.append([text for text in map(self._cleaned, lines) if not is_blank(text)] if texts else None)
        return found

    def draw(self, captions: Captions, seed: int, place: tuple[int, int]) -> int:
        """The number of one of the captions, a pure function: a source by its share of those that are there, then any of its texts alike.

        place: (position, 0) of the order, or (sample, 1 + view) where a store's views are replayed.
        """
        if len(captions.texts) == 1:
            return 0
        which, within = uniform(seed, "caption", place, 2)
        there = sorted(set(captions.source))
        rest = which * sum(self.shares[number] for number in there)
        for number in there:
            rest -= self.shares[number]
            if rest < 0:
                break
        first, count = captions.source.index(number), captions.source.count(number)
        return first + int(within * count)

    def _cleaned(self, text: str) -> str:
        cleaned = text
        if "tags" in self.clean:
            cleaned = _TAG.sub(" ", cleaned)
        if "urls" in self.clean:
            cleaned = _ADDRESS.sub(" ", cleaned)
        if cleaned is not text:  # sub gives the text itself where nothing matches
            cleaned = " ".join(cleaned.split())
        return cleaned.lower() if "lower" in self.clean else cleaned


def json_of(data: bytes, source: CaptionSource) -> Any:
    """The value in a source's member. Raises BadSample: bad_json."""
    try:
        return strict_json.loads(as_text(data), finite=False)  # img2dataset copies a table's NaN
    except BadSample as bad:
        raise BadSample("bad_json", f".{source.member}: {bad.detail}") from bad
    except strict_json.NotStrict as error:
        raise BadSample("bad_json", f".{source.member} {error}") from error


def _fields(value: Any, path: tuple[str, ...], source: CaptionSource) -> Iterable[str]:
    """The texts at the end of the path. Raises BadSample, bad_json, for what is none; null is as good as not there."""
    for place, name in enumerate(path):
        if isinstance(value, list) and name.isdecimal() and len(name) < 10:
            value = value[int(name)] if int(name) < len(value) else None
        elif isinstance(value, list):
            for entry in value:
                yield from _fields(entry, path[place:], source)
            return
        else:
            value = value.get(name) if isinstance(value, dict) else None
    for text in value if isinstance(value, list) else [value]:
        if text is not None and not isinstance(text, str):
            raise BadSample(
                "bad_json", f"{source.name} holds {_JSON.get(type(text), 'a number')}, where a text or a list of texts is needed"
            )
        if text is not None:
            if "\0" in text:
                raise BadSample("bad_text", f"{source.name} holds a NUL")
            yield text
