"""Pairs of shards that hold their embeddings: one recorded augmentation and one caption of each sample, with the teachers' rows of both.

Legend: B pairs, W width of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.data.bad_samples import BadSample, located
from megakd.data.pairs import PairRows, TrainingPairs
from megakd.data.reinforced.replay import recorded_image
from megakd.data.reinforced.shards import Held, ReinforcedShards
from megakd.data.sampler import uniform
from megakd.data.shards import Sample
from megakd.data.store.reader import StoredRows


@dataclass(frozen=True)
class ReinforcedPairs(TrainingPairs):
    """Which augmentation is replayed is drawn evenly from (seed, position), as which caption is read.

    MobileCLIP's training shows the student both the pair's caption and a synthetic one in each step, with a loss of each; here a step sees
    one of them, as with its --dataset-reinforcement-mix-synthetic.
    """

    reinforced: ReinforcedShards

    def read(self, indices: Sequence[int]) -> Iterable[Sample | BadSample]:
        return self.shards.read_each(list(indices), ("image", *self.shards.captions.needs, *self.reinforced.needs))

    def allocate(self, count: int) -> PairRows:
        image_BW, text_BW = (torch.zeros((count, self.reinforced.width)) for _ in range(2))
        stored = StoredRows(image_BW, text_BW, torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool))
        return super().allocate(count)._replace(view=np.zeros(count, np.int64), stored=stored)

    def fill(self, rows: PairRows, row: int, position: int, index: int, item: Sample) -> None:
        assert rows.view is not None, "as allocated"
        assert rows.stored is not None, "as allocated"
        with located(item.where):
            captions = self.shards.captions.read(item.members)
            held = self.reinforced.held(item.members, captions)
            if self.reinforced.replays:
                rows.view[row] = view = self._replay(rows, row, position, item, held)
                rows.stored.image[row] = self.reinforced.unit(held.image[view : view + 1])[0]
            number = self.say(rows, row, captions, self.order.seed, (position, 0))
            rows.stored.text[row] = self.reinforced.unit(held.text[number][None])[0]
        if not self.reinforced.replays:
            super().fill(rows, row, position, index, item)
        rows.stored.known[row] = True

    def _replay(self, rows: PairRows, row: int, position: int, item: Sample, held: Held) -> int:
        """The sample's picture in one of its views, whose number is returned."""
        view = int(uniform(self.views.seed_in(self.order.seed), "view", (position, 0), 1)[0] * len(held.views))
        image = recorded_image(item.members["image"], self.shards.data)
        for pixels, size in zip(rows.pixels, self.sizes, strict=True):
            pixels[row].numpy()[...] = held.views[view].pixels(image, size, self.reinforced.recorded)
        return view

    def recalled(self, rows: PairRows, positions: range, index_B: NDArray[np.int64]) -> tuple[torch.Tensor | None, StoredRows | None]:
        del positions, index_B
        assert rows.view is not None, "as allocated"
        return torch.from_numpy(rows.view), rows.stored
