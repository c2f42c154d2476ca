"""Started on two ranks by test_zero_memory.py: what real DeepSpeed engines hold, counted by the lives of their storages."""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from megakd.planning.memory_tracker import MemoryTracker
from megakd.recipe import Ema, Optim
from megakd.runtime import launch
from megakd.runtime.engine import Engine
from support.parameter_groups import decay_groups

WIDTH, LAYERS = 256, 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, 2 * WIDTH) if i % 2 == 0 else nn.Linear(2 * WIDTH, WIDTH) for i in range(LAYERS)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"out": x}


def settle(watch: MemoryTracker) -> None:
    """What the last place left goes first: cycles, and buffers that gloo's threads hold a moment longer than the collective."""
    before = -1
    while before != watch.live:
        before = watch.live
        gc.collect()
        time.sleep(0.02)


def measure(config: dict[str, Any], world: launch.World) -> dict[str, int]:
    """Live bytes after the start and after a step, and peaks beyond the former in forward, backward and update."""
    gc.collect()
    watch = MemoryTracker("cpu")
    with watch:
        model = Model()
        full = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4 // world.size, "gradient_accumulation_steps": 1,
                "gradient_clipping": 1.0, "steps_per_print": 10**9, **config}  # fmt: skip
        optim = Optim(steps=9, batch=4, lr=1e-3, ema=Ema(decay=0.9) if full.pop("ema", False) else None)
        engine = Engine(model, decay_groups(model, 0.1), optim, full, world, None)
        gc.collect()
        found = {"start": watch.live}
        for _ in range(2):
            for place in ("forward", "backward", "update"):
                settle(watch)
                watch.restart()
                if place == "forward":
                    out = engine.forward(torch.ones(2, WIDTH, dtype=engine.dtype))["out"].float().sum()
                elif place == "backward":
                    engine.backward(out)
                    engine.reduce()
                    del out
                else:
                    engine.update(1e-3)
                found[place] = watch.peak - found["start"]
        gc.collect()
        found["end"] = watch.live
    return found


if __name__ == "__main__":
    world = launch.start()
    results = [measure(json.loads(config), world) for config in sys.argv[1:]]
    if world.rank == 0:
        print("RESULTS" + json.dumps(results))
    launch.stop()
