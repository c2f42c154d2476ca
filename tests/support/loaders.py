"""A training loader of two towers, with an order of few samples a window."""

from __future__ import annotations

import itertools
from typing import Any

from open_clip.transform import PreprocessCfg

from megakd.data.mixture import AnyOrder, order_of_pairs
from megakd.data.pairs import Batch, TrainBatches, train_batches
from megakd.data.shards import ShardSet
from megakd.data.transforms import TowerView
from megakd.recipe import Views
from support.shards import ByteTokenizer

BATCH = 8
TOWERS = {
    "student": TowerView(PreprocessCfg(size=16), ByteTokenizer(12)),
    "teacher": TowerView(PreprocessCfg(size=(24, 20), interpolation="bilinear"), ByteTokenizer(20)),
}


def stream(
    shards: ShardSet,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    start: int = 0,
    views: Views | None = None,
    towers: dict[str, TowerView] = TOWERS,
    **more: Any,
) -> TrainBatches:
    ranks = {"rank": rank, "world": world, "start_position": start, "workers": workers, "pin_memory": False}
    return train_batches(shards, order_of(shards), views or Views(), towers, **ranks, **more)


def order_of(shards: ShardSet) -> AnyOrder:
    return order_of_pairs(len(shards), shards.sources, BATCH, 3, 4, 3)


def take(shards: ShardSet, count: int, **more: Any) -> list[Batch]:
    """The first `count` batches of a stream."""
    with stream(shards, **more) as batches:
        return list(itertools.islice(batches, count))
