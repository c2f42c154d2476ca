"""What a set of shards holds of teachers' embeddings, and for whom: found in a few samples, before anything is loaded.

Legend: B rows of a batch, V views of an image, W width of a row, D a teacher's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megakd.data.bad_samples import BadSample, located
from megakd.data.caption_tokens import as_text, is_blank
from megakd.data.captions import CaptionPolicy, Captions
from megakd.data.reinforced import members
from megakd.data.reinforced.replay import RecordedView
from megakd.data.samples import Slot
from megakd.data.shards import Sample, ShardSet
from megakd.recipe import strict_json
from megakd.recipe.captions import CaptionSource

SYNTHETIC = "syn.json"  # the member that a captioner's texts are in
LOOKED_AT = 16  # samples that are read before a run, evenly spread: a mixture has sources of several kinds
# What rounding to bf16, or a generator in 16 bit, leaves of a unit row is within 1 %.
_UNIT = 0.05


class Held(NamedTuple):
    """Of a sample: views, none where they are not asked for; image (V, W) as stored, text: T rows (W,) likewise, one of each caption."""

    views: tuple[RecordedView, ...]
    image: Tensor
    text: list[Tensor]


@dataclass(frozen=True)
class ReinforcedShards:
    """How the embeddings in a set of shards are read. Pickled to workers.

    widths: D of each teacher that reads them, by its role, in the order in which their parts of a row stand.
    recorded: rows and columns of the pictures that were embedded, the largest of the teachers' inputs.
    replays: whether images and augmentations are read, or texts alone. found: what the samples looked at hold, in words.
    """

    captions: CaptionPolicy
    widths: Mapping[str, int]
    recorded: int
    replays: bool
    found: str = ""

    @property
    def width(self) -> int:
        return sum(self.widths.values())

    def columns(self, role: str) -> slice:
        """Where a teacher's part of a row is."""
        before = list(self.widths)[: list(self.widths).index(role)]
        first = sum(self.widths[name] for name in before)
        return slice(first, first + self.widths[role])

    @property
    def needs(self) -> tuple[Slot, ...]:
        """The members that `held` reads beside the captions'."""
        return needed(self.replays)

    def outline(self) -> str:
        """For people: what is used."""
        parts = ", ".join(f"{role} columns {self.columns(role).start} to {self.columns(role).stop - 1}" for role in self.widths)
        return f"teachers' embeddings from the shards of data.train: {parts}; {self.found}"

    def held(self, found: Mapping[Slot, bytes], captions: Captions) -> Held:
        """What the sample with these members has of the captions that were read of it.

        Raises BadSample: missing_embedding, bad_embedding.
        """
        views: tuple[RecordedView, ...] = ()
        if self.replays:
            if not found.get(members.AUGMENTATIONS):
                raise BadSample("missing_embedding", f"no .{members.AUGMENTATIONS} member")
            views = members.augmentations(found[members.AUGMENTATIONS])
        lists = [f"{source.path[0]}_emb" for source in self.captions.sources if source.path]
        arrays = members.embeddings(found.get(members.NUMPY), found.get(members.TORCH), (members.IMAGES, members.TEXTS, *lists))
        image_VW = arrays[members.IMAGES]
        if image_VW.shape[1] != self.width:
            raise BadSample("bad_embedding", f"rows of {image_VW.shape[1]} numbers, where {self._widths()} are {self.width}")
        if self.replays and len(image_VW) != len(views):
            raise BadSample("bad_embedding", f"{len(image_VW)} rows of {members.IMAGES} for {len(views)} augmentations")
        return Held(views, image_VW, self._texts(found, captions, arrays))

    def _texts(self, found: Mapping[Slot, bytes], captions: Captions, arrays: Mapping[str, Tensor]) -> list[Tensor]:
        """The (W,) row of each caption: which places of a list are captions is what `CaptionPolicy.read` leaves of it."""
        rows: list[Tensor] = []
        first = arrays[members.TEXTS]
        for number, source in enumerate(self.captions.sources):
            count = captions.source.count(number)
            if not count:
                continue
            if source.path is None:
                rows.append(first[0])
                continue
            listed = _listed(found[self.captions.slots[source.member]], source)
            places = [place for place, text in enumerate(listed) if isinstance(text, str) and not is_blank(text)]
            name = f"{source.path[0]}_emb"
            own = first[1:] if len(first) > 1 else arrays.get(name, first[1:])
            if len(own) != len(listed) or len(places) != count:
                raise BadSample(
                    "bad_embedding", f"{len(listed)} captions in {source.name}, and {len(own)} rows for them in {members.TEXTS} or {name}"
                )
            rows += [own[place] for place in places]
        return rows

    def unit(self, rows: Tensor) -> Tensor:
        """(rows, W) of float32, each teacher's part at length 1, near which bf16 leaves it. Raises BadSample where it is far from it."""
        parts = [rows[:, self.columns(role)].float() for role in self.widths]
        for role, part in zip(self.widths, parts, strict=True):
            far = (part.norm(dim=1) - 1).abs()
            if not bool((far < _UNIT).all()):
                raise BadSample("bad_embedding", f"a row of {role} has the length {float(part[far.argmax()].norm()):.3g}, not 1")
        return torch.cat([functional.normalize(part, dim=1) for part in parts], 1)

    def _widths(self) -> str:
        return " + ".join(f"{role} {width}" for role, width in self.widths.items())

    def looked_at(self, shards: ShardSet) -> ReinforcedShards:
        """This one with what some samples hold. Raises ValueError, naming the key, where they hold none that the recipe can use."""
        for source in self.captions.sources:
            if (source.path is None and source.lines) or (source.path is not None and not _is_list(source)):
                raise ValueError(
                    f"data.captions: the shards hold no embeddings of {source.name!r}, which teacher.store = 'data.train' needs; take the "
                    f"captions of the pair, such as txt, or a list of .{SYNTHETIC}, such as '{SYNTHETIC}:syn_text'"
                )
        count = min(LOOKED_AT, len(shards))
        places = [place * len(shards) // count for place in range(count)]
        items = list(shards.read_each(places, (*self.captions.needs, *self.needs)))
        views, texts, kinds, failures = set[int](), set[int](), set[str](), list[BadSample]()
        for item in items:
            try:
                if isinstance(item, BadSample):
                    raise item
                with located(item.where):
                    held = self.held(item.members, self.captions.read(item.members))
                    self.unit(torch.cat([held.image, torch.stack(held.text)]))
            except BadSample as bad:
                failures.append(bad)
                continue
            views.add(len(held.views))
            texts.add(len(held.text))
            kinds.add(_kind(item))
        if not texts:
            raise ValueError(
                f"teacher.store = 'data.train': none of {count} samples looked at can be used: {failures[0].reason}: {failures[0]}. "
                f"{self._remedy(items, failures)}"
            )
        told = f"{_range(views)} augmentations and {_range(texts)} captions" if self.replays else f"{_range(texts)} captions"
        unusable = f", {len(failures)} of them unusable: {failures[0]}" if failures else ""
        found = f"of {count} samples looked at each has {told} ({', '.join(sorted(kinds))}){unusable}"
        return ReinforcedShards(self.captions, self.widths, self.recorded, self.replays, found)

    def _remedy(self, items: Sequence[Sample | BadSample], failures: Sequence[BadSample]) -> str:
        """What to do about the first failure."""
        if "rows of" in failures[0].detail and "numbers" in failures[0].detail:
            return (
                "The order of the teachers is [teacher], then [ensemble] as written; each has its width of a row, and together they have "
                "to be as wide as the shards' rows: name the models that the set was made with"
            )
        if failures[0].reason == "missing_embedding":
            wanted = " and ".join(f".{name}" for name in self.needs if name != members.TORCH)
            return (
                f"Wanted are {wanted} (or .{members.TORCH}) members beside the image and its caption. DataCompDR's own tars hold neither "
                "images nor captions: both sets' tars are joined by the samples' names, as ml-mobileclip's training/README.md says"
            )
        return "Repair the shards, or take teacher.store out"


def needed(replays: bool) -> tuple[Slot, ...]:
    """Extensions of the members that hold embeddings, and where images are replayed their augmentations."""
    return (*((members.AUGMENTATIONS,) if replays else ()), members.NUMPY, members.TORCH)


def _is_list(source: CaptionSource) -> bool:
    return source.member == SYNTHETIC and source.path is not None and len(source.path) == 1


def _listed(data: bytes, source: CaptionSource) -> list[object]:
    """The list itself, blank entries included. Raises BadSample for what is none."""
    assert source.path is not None
    try:
        value = strict_json.loads(as_text(data), finite=False)[source.path[0]]
    except (strict_json.NotStrict, KeyError, TypeError) as error:
        raise BadSample("bad_embedding", f".{source.member}: {error}") from error
    return value if isinstance(value, list) else [value]


def _kind(item: Sample | BadSample) -> str:
    """The member whose embeddings are read."""
    assert isinstance(item, Sample)
    return f".{members.NUMPY}" if item.members.get(members.NUMPY) else f".{members.TORCH}"


def _range(counts: set[int]) -> str:
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
