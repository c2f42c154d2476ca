"""The evaluation loader: every sample of a set exactly once, split over the ranks, as the tower sees it at test time."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from megakd.data.bad_samples import BadCounter, BadSample, Usable, located, usable
from megakd.data.caption_tokens import caption
from megakd.data.samples import Slot
from megakd.data.shards import Sample, ShardSet
from megakd.data.stream import WorkerStream, reported
from megakd.data.transforms import TowerView, content_digest, evaluation_pixels, rgb_image
from megakd.recipe import Data

Field = Literal["pixels", "tokens", "captions", "json", "cls", "content"]
_SLOT_OF: dict[Field, Slot] = {
    "pixels": "image",
    "tokens": "caption",
    "captions": "caption",
    "json": "json",
    "cls": "cls",
    "content": "image",
}
_CLASS = re.compile(r"\d{1,9}")


class SampleSet(Protocol):
    """Samples by index: a `ShardSet`, or files of a folder. See the methods there."""

    @property
    def data(self) -> Data: ...

    @property
    def known_bad(self) -> BadCounter: ...

    def __len__(self) -> int: ...

    def where(self, index: int) -> str: ...

    def read(self, index: int, needs: tuple[Slot, ...]) -> Sample: ...

    def read_each(self, indices: list[int], needs: tuple[Slot, ...]) -> Iterator[Sample | BadSample]: ...


class Unreadable(NamedTuple):
    """A sample that cannot be used, with what could be read of it, by which it is counted as wrong in its place."""

    sample: int
    content: tuple[int, int] | None = None
    caption: str | None = None
    json: dict[str, Any] | None = None
    cls: int | None = None


@dataclass(frozen=True)
class EvaluationBatch:
    """Samples `index`, (B,) int64, of the set, with the requested fields; the others are None.

    pixels (B, 3, H, W) uint8; content (B, 2) int64, equal for equal images; tokens (B, L) int64; captions: B texts; json: B objects;
    cls (B,) int64. bad: counts of the samples that are in no row, unreadable: each of them; B is 0 where all are bad.
    """

    index: torch.Tensor
    bad: BadCounter
    pixels: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    captions: list[str] | None = None
    json: list[dict[str, Any]] | None = None
    cls: torch.Tensor | None = None
    content: torch.Tensor | None = None
    unreadable: tuple[Unreadable, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def pin_memory(self) -> EvaluationBatch:
        pixels, tokens, cls = (None if tensor is None else tensor.pin_memory() for tensor in (self.pixels, self.tokens, self.cls))
        return replace(self, index=self.index.pin_memory(), pixels=pixels, tokens=tokens, cls=cls)


def evaluation_batches(
    samples: SampleSet,
    view: TowerView,
    *,
    rank: int,
    world: int,
    batch: int,
    fields: tuple[Field, ...],
    workers: int,
    pin_memory: bool,
) -> Iterator[EvaluationBatch]:
    """This rank's samples, in order; the concatenation over ranks is the set in order.

    Ranks may yield different numbers of batches: gather results at the end, not after each batch. Samples with a bad image or caption, as
    far as `fields` need them, are counted and logged. Raises ValueError for an unknown field and for a sample without `json` or `cls`.
    """
    unknown = [name for name in fields if name not in _SLOT_OF]
    if unknown or not fields:
        raise ValueError(f"fields = {fields!r}: choose among {', '.join(_SLOT_OF)}")
    first, end = (len(samples) * part // world for part in (rank, rank + 1))
    ranges = [range(start, min(start + batch, end)) for start in range(first, end, batch)]
    return reported(WorkerStream(_EvaluationSet(samples, view, fields), ranges, min(workers, len(ranges)), pin_memory))


@dataclass
class _EvaluationSet:
    samples: SampleSet
    view: TowerView
    fields: tuple[Field, ...]

    def __getitems__(self, indices: range) -> EvaluationBatch:
        needs = tuple(dict.fromkeys(_SLOT_OF[name] for name in self.fields))
        items = self.samples.read_each(list(indices), needs)
        made = usable(indices, items, lambda _, sample: self._parse(sample, needs))
        # of a shard that cannot be read nothing can; what belongs to a file is known without it
        gone = isinstance(self.samples, ShardSet)
        unreadable = (
            Unreadable(index) if gone and bad.reason == "read_error" else self._readable(index, needs) for index, bad in made.unusable
        )
        return self._batch(made, tuple(unreadable))

    def _parse(self, sample: Sample, needs: tuple[Slot, ...]) -> dict[Field, Any]:
        parsed: dict[Field, Any] = {}
        with located(sample.where):
            if "image" in needs:
                image = self._image(sample)
                parsed |= {"pixels": evaluation_pixels(image, self.view.preprocess), "content": self._content(image)}
            if "caption" in needs:
                parsed["captions"] = caption(sample.members["caption"])
        return parsed | {kind: labelled(sample, kind) for kind in ("json", "cls") if kind in needs}

    def _image(self, sample: Sample) -> Image.Image:
        image = rgb_image(sample.members["image"], self.samples.data)
        return image if sample.box is None else image.crop(sample.box)

    def _content(self, image: Image.Image) -> tuple[int, int] | None:
        """128 bits of the pixels, as two numbers of int64: files of one picture may differ. None where `content` is not requested."""
        if "content" not in self.fields:
            return None
        digest = content_digest(image)
        return int.from_bytes(digest[:8], "big", signed=True), int.from_bytes(digest[8:], "big", signed=True)

    def _readable(self, index: int, needs: tuple[Slot, ...]) -> Unreadable:
        """What can be read of a sample that cannot be used."""
        parts = Unreadable(index)
        for slot in needs:
            with contextlib.suppress(BadSample, ValueError):
                sample = self.samples.read(index, (slot,))
                if slot == "json":
                    parts = parts._replace(json=labelled(sample, "json"))
                elif slot == "caption":
                    parts = parts._replace(caption=caption(sample.members[slot]))
                elif slot == "cls":
                    parts = parts._replace(cls=labelled(sample, "cls"))
                elif slot == "image":
                    parts = parts._replace(content=self._content(self._image(sample)))
        return parts

    def _batch(self, made: Usable[dict[Field, Any]], unreadable: tuple[Unreadable, ...]) -> EvaluationBatch:
        rows = made.rows
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in self.fields if name != "tokens"}
        if "pixels" in columns:
            shape = (0, 3, *self.view.train_pixels[:2])
            columns["pixels"] = torch.from_numpy(np.stack(columns["pixels"]) if rows else np.empty(shape, np.uint8))
        if "content" in columns:
            columns["content"] = torch.tensor(columns["content"], dtype=torch.long).reshape(-1, 2)
        if "cls" in columns:
            columns["cls"] = torch.tensor(columns["cls"], dtype=torch.long)
        if "tokens" in self.fields:
            tokens = self.view.tokenize([row["captions"] for row in rows]).long() if rows else torch.empty((0, 0), dtype=torch.long)
            columns["tokens"] = tokens
        return EvaluationBatch(torch.tensor(made.index_of_row, dtype=torch.long), bad=made.bad, unreadable=unreadable, **columns)


def labelled(sample: Sample, slot: Literal["json", "cls"]) -> Any:
    """The object in a sample's .json, or the class number in its .cls. Raises ValueError, with its place, for anything else."""
    if slot not in sample.members:
        content = "the number of its class, from 0, as text" if slot == "cls" else 'an object such as {"negatives": {KIND: FALSE CAPTION}}'
        raise ValueError(
            f"{sample.where} has no .{slot} member, which this evaluation needs: is it a set of another kind? .{slot} holds {content}"
        )
    try:
        text = sample.members[slot].decode("utf-8-sig")
        value = json.loads(text) if slot == "json" else _class_number(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{sample.where}: its .{slot} member cannot be read: {error or type(error).__name__}") from error
    if slot == "json" and not isinstance(value, dict):
        raise ValueError(f"{sample.where}: its .json member holds a {type(value).__name__}, not a dict")
    return value


def _class_number(text: str) -> int:
    """webdataset's .cls: digits, and white space around them."""
    if not (text.strip().isascii() and _CLASS.fullmatch(text.strip())):
        raise ValueError(f"{text[:40]!r} is no class number; it is written in digits, from 0, a line of classnames.txt each")
    return int(text)
