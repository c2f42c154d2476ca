"""A program of its own: what one side's training loader delivers, as float tensors ready for the towers, by one clock for both sides.

Arguments: `ours` or `theirs`, and one JSON object with the arguments of that function. Prints `timed`'s object as JSON.
Started by `loader.py`; open_clip's environment runs it too and has no megakd, so imports of either side are inside its function.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def ours(shards: str, batch: int, workers: int, warm_up: int, batches: int, sizes: list[int], data: dict[str, str]) -> dict[str, float]:
    """megakd's loader on a glob pattern; sizes: a tower's input in pixels, for each tower, whose `normalise` is part of the work.

    data: keys of the recipe's section beside `train` and `workers`.
    """
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg

    from megakd.data.pairs import train_batches
    from megakd.data.sampler import Order
    from megakd.data.shards import ShardSet
    from megakd.data.transforms import TowerView, normalise
    from megakd.recipe import Data, Views

    settings = Data.model_validate({"train": shards, "workers": workers, **data})
    opened = ShardSet.open(settings, rank=0, world=1, barrier=lambda: None)
    order = Order(len(opened), batch, 0, settings.block, settings.window)
    views = Views.model_validate({"crop_scale": [0.9, 1.0], "flip": 0.0})
    tokenize = open_clip.SimpleTokenizer()
    towers = {f"tower{number}": TowerView(PreprocessCfg(size=size), tokenize) for number, size in enumerate(sizes)}
    with train_batches(opened, order, views, towers, rank=0, world=1, start_position=0, workers=workers, pin_memory=False) as stream:

        def take() -> None:
            made = next(stream)
            for name, view in towers.items():
                normalise(made.pixels[name], view.preprocess, torch.float32)

        return timed(take, batch, warm_up, batches)


def theirs(shards: str, batch: int, workers: int, warm_up: int, batches: int, size: int) -> dict[str, float]:
    """The loader that open_clip_train.main would make, on a brace pattern."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from open_clip_train.data import get_data
    from open_clip_train.distributed import init_distributed_device
    from open_clip_train.params import parse_args

    data_flags = ["--train-data", shards, "--dataset-type", "webdataset", "--train-num-samples", str(10**9)]
    args = parse_args([*data_flags, "--batch-size", str(batch), "--workers", str(workers), "--device", "cpu"])
    init_distributed_device(args)
    transform = image_transform_v2(PreprocessCfg(size=size), is_train=True)
    data = get_data(args, (transform, transform), epoch=0, tokenizer=open_clip.SimpleTokenizer())
    data["train"].set_epoch(0)
    stream = iter(data["train"].dataloader)
    return timed(lambda: next(stream), batch, warm_up, batches)


def timed(take: Callable[[], Any], batch: int, warm_up: int, batches: int) -> dict[str, float]:
    """samples_per_second and processor_ms a sample, over `batches` batches after `warm_up` others; workers included."""
    for _ in range(warm_up):
        take()
    start, processor = time.perf_counter(), processor_seconds()
    for _ in range(batches):
        take()
    samples = batches * batch
    seconds = time.perf_counter() - start
    return {"samples_per_second": samples / seconds, "processor_ms": 1000 * (processor_seconds() - processor) / samples}


def processor_seconds() -> float:
    """Processor time of this process and its workers so far: waiting for a processor that others use is not in it."""
    ticks = 0
    for worker in multiprocessing.active_children():
        # after the name, which is in brackets and may hold anything: state, parent, ..., user and system ticks
        fields = Path(f"/proc/{worker.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    measure: Callable[..., dict[str, float]] = ours if sys.argv[1] == "ours" else theirs
    print(json.dumps(measure(**json.loads(sys.argv[2]))), flush=True)
