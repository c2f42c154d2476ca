"""Image-text pairs to train on: shards -> batches of one view per tower.

1. A worker draws one augmentation for each image and applies it at every tower's size, decoding as `pictures.py` says.
2. Captions are tokenised as one list for every tokenizer.
3. Where a store of teacher embeddings is given, the worker replays its augmentations and reads its rows.

Where a sample has several captions, one is drawn each time: by (seed, position), or by (sample, view) where a store is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.data.augmentation import Augmentation, draw, draw_stored
from megakd.data.bad_samples import BadCounter, BadSample, located
from megakd.data.caption_tokens import Tokenize
from megakd.data.captions import CaptionPolicy, Captions
from megakd.data.mixture import AnyOrder
from megakd.data.pictures import Picture
from megakd.data.resumable import BatchSource, Loading, ResumableBatches
from megakd.data.shards import Sample, ShardSet
from megakd.data.store.reader import Store, StoredRows
from megakd.data.transforms import TowerView
from megakd.recipe import Data, Views


class Drawn(NamedTuple):
    """Of B captions: source (B,) int64, the number in the policy's sources; lacking (B,) bool, whether the sample lacks some of these."""

    source: torch.Tensor
    lacking: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch. Towers that see the same share one tensor.

    position: of the global batch's first sample; next_position: what resumes after this batch.
    index: (B,) int64, the samples used, replacements included. Row r was drawn at position + rank * B + r.
    pixels: tower -> (B, 3, H, W) uint8, for `transforms.normalise`; tokens: tower -> (B, L) int64.
    bad: what this rank skipped for this batch. stored: a store's rows of these samples, in the views `view`, (B,) int64; None without one.
    drawn: where the captions are from, None where all are from one source.
    """

    position: int
    next_position: int
    index: torch.Tensor
    pixels: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    bad: BadCounter
    view: torch.Tensor | None = None
    stored: StoredRows | None = None
    drawn: Drawn | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def example(self) -> str | None:
        return self.bad.example

    def to(self, device: torch.device | str, non_blocking: bool) -> Batch:
        """A copy on `device`; shared tensors are moved once and stay shared. `index`, `view`, `stored` and `drawn` stay on the CPU."""
        moved: dict[int, torch.Tensor] = {}

        def move(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            for tensor in tensors.values():
                if id(tensor) not in moved:
                    moved[id(tensor)] = tensor.to(device, non_blocking=non_blocking)
            return {name: moved[id(tensor)] for name, tensor in tensors.items()}

        return replace(self, pixels=move(self.pixels), tokens=move(self.tokens))


def train_batches(
    shards: ShardSet,
    order: AnyOrder,
    views: Views,
    towers: dict[str, TowerView],
    *,
    store: Store | None = None,
    replay: bool = True,
    captions: bool = True,
    pairs: Callable[..., TrainingPairs] | None = None,
    **loading: Unpack[Loading],
) -> TrainBatches:
    """This rank's parts of the global batches from `start_position` on, without end. Raises what `ResumableBatches` does.

    store: read its rows, and replay its augmentations instead of fresh ones, a function of (its seed, sample, epoch mod its views).
    replay: False keeps augmentations fresh, where only the store's texts are of use.
    captions: False reads none, for towers that all have `no_words` for a tokenizer.
    pairs: makes the source of them where shards hold embeddings themselves, see `reinforced.pairs`.
    The parts of all ranks, in rank order, are the same global batch bit for bit for every number of ranks and workers.
    """
    if not towers:
        raise ValueError("no tower is given: there would be nothing to load")
    sizes = list(dict.fromkeys(view.train_pixels for view in towers.values()))
    tokenizers = {view.tokens: view.tokenize for view in towers.values()}
    pixels_of = {name: sizes.index(view.train_pixels) for name, view in towers.items()}
    tokens_of = {name: list(tokenizers).index(view.tokens) for name, view in towers.items()}

    def to_batch(position: int, next_position: int, index: torch.Tensor, columns: _PairColumns, bad: BadCounter) -> Batch:
        pixels = {name: columns.pixels[number] for name, number in pixels_of.items()}
        tokens = {name: columns.tokens[number] for name, number in tokens_of.items()}
        return Batch(position, next_position, index, pixels, tokens, bad, columns.view, columns.stored, columns.drawn)

    source = (pairs or TrainingPairs)(shards, order, views, sizes, list(tokenizers.values()), store, replay, captions)
    return ResumableBatches(source, order, to_batch, **loading)


class _PairColumns(NamedTuple):
    """A batch's distinct tensors, which several towers may share."""

    pixels: list[torch.Tensor]
    tokens: list[torch.Tensor]
    view: torch.Tensor | None
    stored: StoredRows | None
    drawn: Drawn | None


TrainBatches = ResumableBatches[_PairColumns, Batch]


class PairRows(NamedTuple):
    """(B, 3, H, W) uint8 for each distinct input size; of the B captions the text, the number among the sample's, and `Drawn`.

    view, stored: as in `Batch`, where shards hold embeddings themselves.
    """

    pixels: list[torch.Tensor]
    captions: list[str]
    number: NDArray[np.int64]
    source: NDArray[np.int64]
    lacking: NDArray[np.bool_]
    view: NDArray[np.int64] | None = None
    stored: StoredRows | None = None


@dataclass(frozen=True)
class TrainingPairs(BatchSource[Sample, PairRows, _PairColumns]):
    shards: ShardSet
    order: AnyOrder
    views: Views
    sizes: list[tuple[int, int, int]]
    tokenizers: list[Tokenize]
    store: Store | None
    replay: bool
    captions: bool

    item_name = "sample"
    contents = "shards"
    batch_key = "optim.batch"
    remedy = "Almost all of data.train is unusable; repair it (data.max_bad_fraction does not help here)"

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, indices: Sequence[int]) -> Iterable[Sample | BadSample]:
        return self.shards.read_each(list(indices), ("image", *self.shards.captions.needs) if self.captions else ("image",))

    def allocate(self, count: int) -> PairRows:
        pixels = [torch.empty((count, 3, height, width), dtype=torch.uint8) for height, width, _ in self.sizes]
        return PairRows(pixels, [""] * count, np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.bool_))

    def fill(self, rows: PairRows, row: int, position: int, index: int, item: Sample) -> None:
        with located(item.where):
            picture, captions = opened_pair(item, self.shards.captions if self.captions else None, self.shards.data)
            if captions is not None:
                self.say(rows, row, captions, *self._caption_place(position, index))
            augmentation = self._augmentation(position, index, *picture.size)
            for pixels, size in zip(rows.pixels, self.sizes, strict=True):
                pixels[row].numpy()[...] = picture.pixels(augmentation, size)

    def say(self, rows: PairRows, row: int, captions: Captions, seed: int, place: tuple[int, int]) -> int:
        """Draw one of a sample's captions into its row. Returns its number among them."""
        number = rows.number[row] = self.shards.captions.draw(captions, seed, place)
        rows.captions[row], rows.source[row] = captions.texts[number], captions.source[number]
        rows.lacking[row] = len(set(captions.source)) < len(self.shards.captions.sources)
        return int(number)

    def collate(self, rows: PairRows, positions: range, index_B: NDArray[np.int64]) -> _PairColumns:
        tokens = [tokenize(rows.captions).long() for tokenize in self.tokenizers]
        several = self.captions and len(self.shards.captions.sources) > 1
        drawn = Drawn(torch.from_numpy(rows.source), torch.from_numpy(rows.lacking)) if several else None
        view, stored = self.recalled(rows, positions, index_B)
        return _PairColumns(rows.pixels, tokens, view, stored, drawn)

    def recalled(self, rows: PairRows, positions: range, index_B: NDArray[np.int64]) -> tuple[torch.Tensor | None, StoredRows | None]:
        """The views of a store that are replayed, and its rows of them."""
        if self.store is None:
            return None, None
        view = np.array([self.store.view_at(self.order.epoch(position)) for position in positions], np.int64)
        return torch.from_numpy(view), self.store.read(index_B, view, rows.number)

    def _augmentation(self, position: int, index: int, width: int, height: int) -> Augmentation:
        if self.store is None or not self.replay:
            return draw(self.views, self.views.seed_in(self.order.seed), position, width, height)
        view = self.store.view_at(self.order.epoch(position))
        return draw_stored(self.views, self.store.manifest.seed, index, view, width, height)

    def _caption_place(self, position: int, index: int) -> tuple[int, tuple[int, int]]:
        """The seed and the place by which a caption is drawn, as an augmentation is."""
        if self.store is None or not self.replay:
            return self.order.seed, (position, 0)
        return self.store.manifest.seed, (index, 1 + self.store.view_at(self.order.epoch(position)))


def opened_pair(sample: Sample, policy: CaptionPolicy | None, data: Data) -> tuple[Picture, Captions | None]:
    """The image, and the sample's captions, None without a policy. Raises BadSample, as the picture's pixels do."""
    captions = None if policy is None else policy.read(sample.members)
    return Picture(sample.members["image"], data), captions
