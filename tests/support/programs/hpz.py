"""Started on four ranks by test_hpz.py: a run of ZeRO-3 and one with hpZ's second copies in two groups of two, compared."""

from __future__ import annotations

import json
from typing import Any

import torch

from megakd.runtime import launch
from megakd.runtime.engine import forget
from support.programs import engine_states
from support.programs.engine_states import CONFIGURATIONS, measure

ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 1}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[part][name], other[part][name]) for part in ("weights", "moments") for name in one[part])


if __name__ == "__main__":
    world, found = launch.start(), {}
    for precision in ("bf16", "fp32"):
        runs = []
        for more in ({}, {"zero_hpz_partition_size": 2}):
            section = {"zero_optimization": {**ZERO, **more}, "bf16": {"enabled": precision == "bf16"}}
            engine_states.CONFIGURATIONS = {**CONFIGURATIONS, "this": section}
            runs.append(measure("this", world, None))
            forget()
        plain, hpz = runs
        found[precision] = {
            "norms": plain["norms"] == hpz["norms"],
            "end": same(plain["end"], hpz["end"]),
            "moved": not same(hpz["middle"], hpz["end"]),
            "resumed": hpz["norms_resumed"] == hpz["norms"] and same(hpz["end_resumed"], hpz["end"]),
        }
    if world.is_main:
        print("RESULTS" + json.dumps(found))
    launch.stop()
