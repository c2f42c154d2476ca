"""Batches to train on, without end and resumable anywhere: the one loader behind image-text pairs and questions.

1. `Order` turns a position into an index; a rank takes its contiguous part of each global batch.
2. A worker reads that part from a `BatchSource` and makes a row of each item.
3. An item that cannot be used is counted, and the order's next choice for its position takes its place.
4. The main process logs what was bad and hands out batches, each with the position that resumes after it.

The rows of all ranks, in rank order, are the same global batch for every number of ranks and workers.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.data.bad_samples import BadCounter, BadLog, BadSample
from megakd.data.mixture import AnyOrder, MixtureOrder
from megakd.data.stream import WorkerStream

Item = TypeVar("Item")  # what is read of one index
Rows = TypeVar("Rows")  # the rows of a batch while they are filled
Columns = TypeVar("Columns")  # a batch's tensors: a NamedTuple, or what else torch sends between processes and pins
BatchT = TypeVar("BatchT")

# At a bad fraction of .9 one position in a thousand has no row after so many.
_ATTEMPTS = 64


class Loading(TypedDict):
    """Which part of the global batches is loaded, from which position on, by how many processes, and whether batches are pinned."""

    rank: int
    world: int
    start_position: int
    workers: int
    pin_memory: bool


class BatchSource(ABC, Generic[Item, Rows, Columns]):
    """What a worker makes batches of. It is pickled to the workers.

    For errors: item_name, "sample" or "question"; contents, what holds them; batch_key, the recipe's key of the global batch; remedy, where
    no usable item is found for a position.
    """

    item_name: ClassVar[str]
    contents: ClassVar[str]
    batch_key: ClassVar[str]
    remedy: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterable[Item | BadSample]:
        """One result for each index, in order."""

    @abstractmethod
    def allocate(self, count: int) -> Rows:
        """Empty rows."""

    @abstractmethod
    def fill(self, rows: Rows, row: int, position: int, index: int, item: Item) -> None:
        """Make `row` of the item at `index`, drawn at `position` of the order. Raises BadSample; the row is then filled anew."""

    @abstractmethod
    def collate(self, rows: Rows, positions: range, index_B: NDArray[np.int64]) -> Columns:
        """The batch of filled rows."""


class ResumableBatches(Iterator[BatchT], Generic[Columns, BatchT]):
    """This rank's parts of the global batches from `start_position` on, without end; a context manager. `close()` ends the workers.

    to_batch(position, next_position, index_B, columns, bad) makes what is handed out. position: of the global batch's first item;
    index_B: (B,) int64, the items used, replacements included; bad: what this rank skipped, of `seen` items tried.

    Raises ValueError when the global batch does not divide by the ranks, when the order was made for another source, and, while
    iterating, when no usable item is found for a position; a worker's bugs come with its traceback.
    """

    def __init__(
        self,
        source: BatchSource[Item, Rows, Columns],
        order: AnyOrder,
        to_batch: Callable[[int, int, torch.Tensor, Columns, BadCounter], BatchT],
        *,
        rank: int,
        world: int,
        start_position: int,
        workers: int,
        pin_memory: bool,
    ) -> None:
        if order.batch % world:
            raise ValueError(
                f"{source.batch_key} = {order.batch} does not divide by {world} ranks: make it a multiple of the number of ranks"
            )
        if order.samples != len(source):
            raise ValueError(f"the order covers {order.samples} {source.item_name}s, but the {source.contents} hold {len(source)}")
        if start_position < 0:
            raise ValueError(f"start_position = {start_position}: positions start at 0")
        self._batch, self._position, self._to_batch, self._log = order.batch, start_position, to_batch, BadLog()
        size = order.batch // world
        positions = (range(first, first + size) for first in itertools.count(start_position + rank * size, order.batch))
        self._stream: WorkerStream[_Loaded[Columns]] = WorkerStream(_PositionSet(source, order), positions, workers, pin_memory)

    def __next__(self) -> BatchT:
        loaded = next(self._stream)
        self._log.report(loaded.bad)
        if loaded.columns is None:
            self.close()
            raise ValueError(loaded.failure)
        position, self._position = self._position, self._position + self._batch
        return self._to_batch(position, self._position, loaded.index_B, loaded.columns, loaded.bad)

    def close(self) -> None:
        self._log.close()
        self._stream.close()

    def __enter__(self) -> ResumableBatches[Columns, BatchT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Loaded(NamedTuple, Generic[Columns]):
    """What a worker sends: a batch, or without columns why there is none."""

    index_B: torch.Tensor
    columns: Columns | None
    bad: BadCounter
    failure: str = ""


@dataclass(frozen=True)
class _PositionSet(Generic[Item, Rows, Columns]):
    """The dataset in a worker: positions -> one rank's part of a batch."""

    source: BatchSource[Item, Rows, Columns]
    order: AnyOrder

    def __getitems__(self, positions: range) -> _Loaded[Columns]:
        sources = self.order.sources if isinstance(self.order, MixtureOrder) else ()
        bad = BadCounter(by_source={source.name: BadCounter() for source in sources})
        index_B = self.order.indices(positions.start, len(positions))
        items = self.source.read(index_B.tolist())
        rows = self.source.allocate(len(positions))
        for row, (position, item) in enumerate(zip(positions, items, strict=True)):
            used = self._fill(rows, row, position, int(index_B[row]), item, bad)
            if used is None:
                of = f" of source {self.order.source_of(int(index_B[row]))}" if isinstance(self.order, MixtureOrder) else ""
                failure = (
                    f"no usable {self.source.item_name}{of} in {_ATTEMPTS} attempts for position {position}: {bad.by_reason()}. "
                    f"Example: {bad.example}. {self.source.remedy}"
                )
                return _Loaded(torch.empty(0), None, bad, failure)
            index_B[row] = used
        return _Loaded(torch.from_numpy(index_B), self.source.collate(rows, positions, index_B), bad)

    def _fill(self, rows: Rows, row: int, position: int, index: int, item: Item | BadSample, bad: BadCounter) -> int | None:
        """Fill a row; the index of the item used, a replacement's if `index` is bad, None where no attempt found a usable one."""
        counters = [bad]
        if isinstance(self.order, MixtureOrder):  # whose replacements are of the same source
            counters.append(bad.by_source[self.order.source_of(index)])
        for attempt in range(_ATTEMPTS):
            if attempt:
                index = self.order.replacement(position, attempt)
                (item,) = self.source.read([index])
            for counter in counters:
                counter.seen += 1
            try:
                if isinstance(item, BadSample):
                    raise item
                self.source.fill(rows, row, position, index, item)
            except BadSample as error:
                for counter in counters:
                    counter.add(error.reason, str(error))
            else:
                return index
        return None
