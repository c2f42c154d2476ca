"""The training loader: shards -> batches of one view per tower.

1. `Order` turns a position into a sample; a rank takes its contiguous part of each global batch.
2. A worker reads that part's samples, decodes each image once, crops it once and resizes it for every tower.
3. A sample that cannot be used is counted, and the order's next choice for its position takes its place.
4. Captions are tokenised as one list for every tokenizer.
5. Where a store of teacher embeddings is given, the worker replays its augmentations and reads its rows.
6. The main process logs what was bad and hands out `Batch`es.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from megakd.data.bad_samples import BadCounter, BadLog, BadSample, Reason
from megakd.data.caption_tokens import Tokenize
from megakd.data.sampler import Order, Positions
from megakd.data.shards import Sample, ShardSet
from megakd.data.store.reader import Rows, Store
from megakd.data.stream import WorkerStream
from megakd.data.transforms import Augmentation, TowerView, draw, draw_stored, rgb_image, train_pixels
from megakd.recipe import Views

# At a bad fraction of .9 one position in a thousand is still without a sample after this many.
_ATTEMPTS = 64
# A million letters are no caption; a tokenizer would take seconds for them.
_LONGEST_CAPTION = 1 << 20


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch. Towers that see the same share one tensor.

    position: of the global batch's first sample, over all ranks; next_position: what resumes after this batch.
    index: (B,) int64, the samples used, replacements included. Row r was drawn at position + rank * B + r.
    pixels: tower -> (B, 3, H, W) uint8, for `transforms.normalise`; tokens: tower -> (B, L) int64.
    bad: what this rank skipped for this batch, with `seen` samples tried and examples.
    stored: what a store has of these samples, and view: (B,) int64, the numbers of the views they are seen in; None without one.
    """

    position: int
    next_position: int
    index: torch.Tensor
    pixels: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    bad: BadCounter
    view: torch.Tensor | None = None
    stored: Rows | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def example(self) -> str | None:
        return self.bad.example

    def to(self, device: torch.device | str, non_blocking: bool) -> Batch:
        """A copy on `device`; shared tensors are moved once and stay shared. `index`, `view` and `stored` stay on the CPU."""
        moved: dict[int, torch.Tensor] = {}

        def move(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            for tensor in tensors.values():
                if id(tensor) not in moved:
                    moved[id(tensor)] = tensor.to(device, non_blocking=non_blocking)
            return {name: moved[id(tensor)] for name, tensor in tensors.items()}

        return replace(self, pixels=move(self.pixels), tokens=move(self.tokens))


class TrainBatches(Iterator[Batch]):
    """What `train_batches` returns: an endless iterator and a context manager. `close()` ends its workers."""

    def __init__(self, dataset: _TrainSet, towers: dict[str, TowerView], start_position: int, workers: int, pin_memory: bool) -> None:
        self._order = dataset.order
        self._pixels_of = {name: dataset.pixels.index(view.train_pixels) for name, view in towers.items()}
        self._tokens_of = {name: list(dataset.tokenizers).index(view.tokens) for name, view in towers.items()}
        self._log = BadLog()
        self._position = start_position
        self._stream: WorkerStream[_Part] = WorkerStream(
            dataset, Positions(dataset.order, dataset.rank, dataset.world, start_position), workers, pin_memory
        )

    def __next__(self) -> Batch:
        part = next(self._stream)
        bad = BadCounter.from_list(part.counts, part.examples)
        self._log.report(bad)
        if part.failure:
            self.close()
            raise ValueError(part.failure)
        position, self._position = self._position, self._position + self._order.batch
        pixels = {name: part.pixels[number] for name, number in self._pixels_of.items()}
        tokens = {name: part.tokens[number] for name, number in self._tokens_of.items()}
        return Batch(position, self._position, part.index, pixels, tokens, bad, part.view, part.stored)

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> TrainBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def train_batches(
    shards: ShardSet,
    order: Order,
    views: Views,
    towers: dict[str, TowerView],
    *,
    rank: int,
    world: int,
    start_position: int,
    workers: int,
    pin_memory: bool,
    store: Store | None = None,
    replay: bool = True,
) -> TrainBatches:
    """This rank's parts of the global batches from `start_position` on, without end.

    store: read its rows, and replay its augmentations instead of fresh ones, a function of (its seed, sample, epoch mod its views).
    replay: False keeps augmentations fresh, where only the store's texts are of use.

    The parts of all ranks, in rank order, are the same global batch bit for bit for every number of ranks and workers.
    Raises ValueError when the global batch does not divide by the ranks, when the order was made for other data, and, while
    iterating, when no usable sample is found for a position; errors of a worker come with its traceback.
    """
    if order.batch % world:
        raise ValueError(f"optim.batch = {order.batch} does not divide by {world} ranks: make it a multiple of the number of ranks")
    if order.samples != len(shards):
        raise ValueError(f"the order covers {order.samples} samples, but the shards hold {len(shards)}")
    if start_position < 0:
        raise ValueError(f"start_position = {start_position}: positions start at 0")
    if not towers:
        raise ValueError("no tower is given: there would be nothing to load")
    pixels = list(dict.fromkeys(view.train_pixels for view in towers.values()))
    tokenizers = {view.tokens: view.tokenize for view in towers.values()}
    dataset = _TrainSet(shards, order, views, pixels, tokenizers, rank, world, store, replay)
    return TrainBatches(dataset, towers, start_position, workers, pin_memory)


@dataclass
class _Part:
    """What a worker ships: plain lists of distinct tensors, and the counts as `BadCounter.to_list` gives them."""

    index: torch.Tensor
    pixels: list[torch.Tensor]
    tokens: list[torch.Tensor]
    counts: list[int]
    examples: dict[Reason, str]
    failure: str = ""
    view: torch.Tensor | None = None
    stored: Rows | None = None

    def pin_memory(self) -> _Part:
        pixels, tokens = [pixel.pin_memory() for pixel in self.pixels], [token.pin_memory() for token in self.tokens]
        stored = None if self.stored is None else Rows(*(values.pin_memory() for values in self.stored))
        return replace(self, index=self.index.pin_memory(), pixels=pixels, tokens=tokens, stored=stored)


class _Exhausted(Exception):
    """No usable sample was found for a position."""


@dataclass
class _TrainSet:
    """The dataset in the worker: positions -> one part of a batch."""

    shards: ShardSet
    order: Order
    views: Views
    pixels: list[tuple[int, int, int]]
    tokenizers: dict[str, Tokenize]
    rank: int
    world: int
    store: Store | None
    replay: bool

    def __getitems__(self, positions: range) -> _Part:
        count = len(positions)
        pixels = [torch.empty((count, 3, height, width), dtype=torch.uint8) for height, width, _ in self.pixels]
        outs = [tensor.numpy() for tensor in pixels]
        index, texts, bad = np.empty(count, np.int64), [""] * count, BadCounter()
        chosen = [int(sample) for sample in self.order.indices(positions.start, count)]
        samples = self.shards.read_each(chosen, ("image", "caption"))
        try:
            for row, (position, first) in enumerate(zip(positions, samples, strict=True)):
                index[row], texts[row] = self._place(position, chosen[row], first, [out[row] for out in outs], bad)
        except _Exhausted as error:
            return _Part(torch.empty(0), [], [], bad.to_list(), dict(bad.examples), str(error))
        tokens = [tokenize(texts).long() for tokenize in self.tokenizers.values()]
        part = _Part(torch.from_numpy(index), pixels, tokens, bad.to_list(), dict(bad.examples))
        if self.store is not None:
            view = np.array([self.store.view_at(position, self.order.epoch_length) for position in positions], np.int64)
            part.view, part.stored = torch.from_numpy(view), self.store.read(index, view)
        return part

    def _place(self, position: int, chosen: int, sample: Sample | BadSample, rows: list[np.ndarray], bad: BadCounter) -> tuple[int, str]:
        """Fills the rows of one position and returns the sample that did it, with its caption."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                chosen = self.order.replacement(position, attempt)
                (sample,) = self.shards.read_each([chosen], ("image", "caption"))
            bad.seen += 1
            try:
                return chosen, self._view(position, chosen, sample, rows)
            except BadSample as error:
                bad.add(error.reason, str(error))
        raise _Exhausted(
            f"no usable sample in {_ATTEMPTS} attempts for position {position}: {bad.by_reason()}. Example: {bad.example}. "
            f"Almost all of data.train is unusable; repair it (data.max_bad_fraction does not help here)"
        )

    def _view(self, position: int, chosen: int, sample: Sample | BadSample, rows: list[np.ndarray]) -> str:
        image, text = decoded(sample, self.shards.data.max_pixels)
        augmentation = self._augmentation(position, chosen, *image.size)
        for row, view in zip(rows, self.pixels, strict=True):
            row[...] = train_pixels(image, augmentation, view)
        return text

    def _augmentation(self, position: int, chosen: int, width: int, height: int) -> Augmentation:
        if self.store is None or not self.replay:
            return draw(self.views, self.order.seed, position, width, height)
        view = self.store.view_at(position, self.order.epoch_length)
        return draw_stored(self.views, self.store.manifest.seed, chosen, view, width, height)


def decoded(sample: Sample | BadSample, max_pixels: int) -> tuple[Image.Image, str]:
    """The image in RGB, and its caption. Raises BadSample, with the sample's place."""
    if isinstance(sample, BadSample):
        raise sample
    with located(sample.where):
        text = caption(sample.members["caption"])
        return rgb_image(sample.members["image"], max_pixels), text


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Tells a bad sample found inside where it is."""
    try:
        yield
    except BadSample as bad:
        raise BadSample(bad.reason, bad.detail, where) from bad


def caption(data: bytes) -> str:
    """The caption as it is stored, without a byte-order mark. Raises BadSample: bad_text, or empty_caption for nothing to be seen."""
    if len(data) > _LONGEST_CAPTION:
        raise BadSample("bad_text", f"{len(data)} bytes, more than {_LONGEST_CAPTION}: no caption")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad_text", str(error)) from error
    if "\0" in text:
        raise BadSample("bad_text", "holds a NUL: damaged, or no UTF-8")
    # white space, and signs that control or format
    if all(letter.isspace() or unicodedata.category(letter)[0] == "C" for letter in text):
        raise BadSample("empty_caption", "white space alone")
    return text
