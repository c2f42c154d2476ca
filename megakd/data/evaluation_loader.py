"""The evaluation loader: every sample of a set exactly once, split over the ranks, as the tower sees it at test time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from megakd.data.bad import BadCounter, BadSample
from megakd.data.index import Slot
from megakd.data.loader import caption, located
from megakd.data.shards import Sample, ShardSet
from megakd.data.views import TowerView, decode, evaluation_pixels
from megakd.data.workers import WorkerStream, reported

Field = Literal["pixels", "tokens", "captions", "json", "cls"]
_SLOT_OF: dict[Field, Slot] = {"pixels": "image", "tokens": "caption", "captions": "caption", "json": "json", "cls": "cls"}


@dataclass(frozen=True)
class EvaluationBatch:
    """Samples `index`, (B,) int64, of the set, with the fields that were asked for; the others are None.

    pixels (B, 3, H, W) uint8, tokens (B, L) int64, captions: B raw texts, json: B objects, cls (B,) int64.
    bad: samples skipped, which are in no batch; a batch of nothing but bad samples comes with B = 0.
    """

    index: torch.Tensor
    pixels: torch.Tensor | None
    tokens: torch.Tensor | None
    captions: list[str] | None
    json: list[dict[str, Any]] | None
    cls: torch.Tensor | None
    bad: BadCounter

    def __len__(self) -> int:
        return len(self.index)

    def pin_memory(self) -> EvaluationBatch:
        pixels, tokens, cls = (None if tensor is None else tensor.pin_memory() for tensor in (self.pixels, self.tokens, self.cls))
        return replace(self, index=self.index.pin_memory(), pixels=pixels, tokens=tokens, cls=cls)


def evaluation_batches(
    shards: ShardSet,
    view: TowerView,
    *,
    rank: int,
    world: int,
    batch: int,
    fields: tuple[Field, ...],
    workers: int,
    pin_memory: bool,
) -> Iterator[EvaluationBatch]:
    """This rank's samples, in order: contiguous parts, so that the concatenation over ranks is the set in order.

    Ranks may yield different numbers of batches: gather results at the end, not after each batch.
    Raises ValueError for an unknown field and for a sample without the `json` or `cls` that was asked for: the set is then of
    another kind. Samples with a bad image or caption, as far as `fields` need them, are skipped, counted and logged.
    """
    unknown = [name for name in fields if name not in _SLOT_OF]
    if unknown or not fields:
        raise ValueError(f"fields = {fields!r}: choose among {', '.join(_SLOT_OF)}")
    first, end = (len(shards) * part // world for part in (rank, rank + 1))
    ranges = [range(start, min(start + batch, end)) for start in range(first, end, batch)]
    return reported(WorkerStream(_EvaluationSet(shards, view, fields), ranges, min(workers, len(ranges)), pin_memory))


@dataclass
class _EvaluationSet:
    shards: ShardSet
    view: TowerView
    fields: tuple[Field, ...]

    def __getitems__(self, indices: range) -> EvaluationBatch:
        needs = tuple(dict.fromkeys(_SLOT_OF[name] for name in self.fields))
        rows: list[tuple[int, dict[Slot, Any]]] = []
        bad = BadCounter(seen=len(indices))
        for index, sample in zip(indices, self.shards.read_each(list(indices), needs), strict=True):
            try:
                rows.append((index, self._parse(sample, needs)))
            except BadSample as error:
                bad.add(error.reason, str(error))
        return self._batch(rows, bad)

    def _parse(self, sample: Sample | BadSample, needs: tuple[Slot, ...]) -> dict[Slot, Any]:
        if isinstance(sample, BadSample):
            raise sample
        parsed: dict[Slot, Any] = {}
        with located(sample.where):
            if "image" in needs:
                parsed["image"] = evaluation_pixels(decode(sample.members["image"], self.shards.data.max_pixels), self.view.preprocess)
            if "caption" in needs:
                parsed["caption"] = caption(sample.members["caption"])
        if "json" in needs:
            parsed["json"] = _labelled(sample, "json", json.loads, dict)
        if "cls" in needs:
            parsed["cls"] = _labelled(sample, "cls", int, int)
        return parsed

    def _batch(self, rows: list[tuple[int, dict[Slot, Any]]], bad: BadCounter) -> EvaluationBatch:
        def column(name: Field) -> list[Any] | None:
            return [parsed[_SLOT_OF[name]] for _, parsed in rows] if name in self.fields else None

        pixels, texts, classes = column("pixels"), column("tokens"), column("cls")
        shape = (0, 3, *self.view.train_pixels[:2])
        stacked = None if pixels is None else torch.from_numpy(np.stack(pixels) if pixels else np.empty(shape, np.uint8))
        tokens = None if texts is None else self.view.tokenize(texts).long() if texts else torch.empty((0, 0), dtype=torch.long)
        index = torch.tensor([index for index, _ in rows], dtype=torch.long)
        labels = None if classes is None else torch.tensor(classes, dtype=torch.long)
        return EvaluationBatch(index, stacked, tokens, column("captions"), column("json"), labels, bad)


def _labelled(sample: Sample, slot: Slot, parse: Callable[[str], Any], kind: type) -> Any:
    if slot not in sample.members:
        raise ValueError(f"{sample.where} has no .{slot} member, which this evaluation needs: is it a set of another kind?")
    try:
        value = parse(sample.members[slot].decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{sample.where}: its .{slot} member cannot be read: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{sample.where}: its .{slot} member holds a {type(value).__name__}, not a {kind.__name__}")
    return value
