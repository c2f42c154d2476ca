"""Samples by index in the augmentations of a store, for writing it and for what it lacks.

Legend: N samples, V views of each, H x W the teacher's input size, L its context length.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megakd.data.augmentation import draw_stored
from megakd.data.bad_samples import BadCounter, located, usable
from megakd.data.pairs import opened_pair
from megakd.data.shards import Sample, ShardSet
from megakd.data.stream import WorkerStream, reported
from megakd.data.transforms import TowerView
from megakd.recipe import Views


@dataclass(frozen=True)
class Seen:
    """N usable samples for a teacher, and the counts of the others.

    index: (N,) int64; pixels: (N, V, 3, H, W) uint8 for `transforms.normalise`; tokens: (T, L) int64, of every caption of the samples one
    after the other; captions: (N,) int64, how many each has. With one caption of each, T is N.
    """

    index: Tensor
    pixels: Tensor
    tokens: Tensor
    captions: Tensor
    bad: BadCounter

    def pin_memory(self) -> Seen:
        return replace(self, pixels=self.pixels.pin_memory(), tokens=self.tokens.pin_memory())


@dataclass(frozen=True)
class StoredViews:
    """Samples in a store's augmentations, for one tower. Pickled to workers, as their dataset.

    captions: False for one of images alone. every: all captions of a sample, which a store holds, not the one that is drawn in its view.
    """

    shards: ShardSet
    views: Views
    seed: int
    tower: TowerView
    captions: bool = True
    every: bool = False

    def see(self, index_N: NDArray[np.int64], view_NV: NDArray[np.int64]) -> Seen:
        """The usable ones of the samples `index_N`, each in its views `view_NV`, with the caption of the first of them."""
        height, width, _ = self.tower.train_pixels
        pixels = np.empty((*view_NV.shape, 3, height, width), np.uint8)
        texts, counts = list[str](), list[int]()
        policy = self.shards.captions if self.captions else None

        def to_row(place: int, sample: Sample) -> None:  # place: in index_N, where a sample may stand twice
            with located(sample.where):
                picture, captions = opened_pair(sample, policy, self.shards.data)
                for number, view in enumerate(view_NV[place].tolist()):
                    augmentation = draw_stored(self.views, self.seed, int(index_N[place]), view, *picture.size)
                    pixels[len(counts), number] = picture.pixels(augmentation, self.tower.train_pixels)
            said = ("",) if captions is None else captions.texts
            if policy is not None and captions is not None and not self.every:
                said = (said[policy.draw(captions, self.seed, (int(index_N[place]), 1 + int(view_NV[place, 0])))],)
            texts.extend(said)
            counts.append(len(said))

        needs = ("image",) if policy is None else ("image", *policy.needs)
        made = usable(range(len(index_N)), self.shards.read_each(index_N.tolist(), needs), to_row)
        tokens = self.tower.tokenize(texts or [""]).long()[: len(texts)]  # a tokenizer may not take an empty list
        index = torch.from_numpy(index_N[made.index_of_row].astype(np.int64))
        return Seen(index, torch.from_numpy(pixels[: len(counts)]), tokens, torch.tensor(counts, dtype=torch.int64), made.bad)

    def see_all(self, index_M: NDArray[np.int64], view_M: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """pixels (M, 3, H, W) uint8 and tokens (M, L) of samples in one view each; one blank pair for M = 0.

        Raises ValueError for a sample that cannot be used: the student has read it a moment ago.
        """
        if len(index_M) == 0:
            height, width, _ = self.tower.train_pixels
            return torch.zeros((1, 3, height, width), dtype=torch.uint8), self.tower.tokenize([""]).long()
        seen = self.see(index_M, view_M[:, None])
        if seen.bad.total:
            raise ValueError(f"a sample could be read for the student and not again for the teacher: {seen.bad.example}")
        return seen.pixels[:, 0], seen.tokens

    def __getitems__(self, part: _SampleViews) -> Seen:
        return self.see(part.index_N, part.view_NV)

    def stream(
        self, parts: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]], workers: int, pin_memory: bool
    ) -> Generator[Seen, None, None]:
        """see() of each (index_N, view_NV), in order, made by `workers` processes; bad samples are logged."""
        stream: WorkerStream[Seen] = WorkerStream(self, [_SampleViews(*part) for part in parts], workers, pin_memory)
        yield from reported(stream)


@dataclass(frozen=True)
class _SampleViews:
    """The arguments of one `see`; torch's loader takes a batch's length."""

    index_N: NDArray[np.int64]
    view_NV: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index_N)
