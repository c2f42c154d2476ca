"""A training loader of two towers on a small set, with an order of few samples a window."""

from __future__ import annotations

from open_clip.transform import PreprocessCfg

from megakd.data.pairs import TrainBatches, train_batches
from megakd.data.sampler import Order
from megakd.data.shards import ShardSet
from megakd.data.transforms import TowerView
from megakd.recipe import Views
from support.shards import ByteTokenizer

BATCH = 8
TOWERS = {
    "student": TowerView(PreprocessCfg(size=16), ByteTokenizer(12)),
    "teacher": TowerView(PreprocessCfg(size=(24, 20), interpolation="bilinear"), ByteTokenizer(20)),
}


def stream(shards: ShardSet, rank: int = 0, world: int = 1, workers: int = 0, start: int = 0, batch: int = BATCH) -> TrainBatches:
    order = Order(len(shards), batch, seed=3, block=4, window=3)
    return train_batches(shards, order, Views(), TOWERS, rank=rank, world=world, start_position=start, workers=workers, pin_memory=False)
