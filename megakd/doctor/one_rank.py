"""A program of its own: one rank that meets the others as a run's do, and sums with them. `ranks.py` starts it.

Prints one line of JSON on rank 0: what each backend sums a second, in bytes of the tensor.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megakd.recipe.credentials import redact
from megakd.runtime import failures, launch

SECONDS = 90  # for meeting and summing, once all is imported; SIGALRM ends a rank that hangs
NUMBERS = 1 << 22
ROUNDS = 5


def main() -> int:
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    try:
        world = launch.start(timeout=timedelta(seconds=SECONDS))
        measured = {"gloo": _speed(torch.device("cpu"))}
        if world.device.type == "cuda":
            measured["nccl"] = _speed(world.device)
        if world.is_main:
            print(json.dumps({"ranks": world.size, "bytes_per_second": measured}))
    except Exception as error:
        print(redact(failures.explain(error) or f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 1
    finally:
        launch.stop()
    return 0


def _speed(device: torch.device) -> float:
    """Bytes a second of an all-reduce, the best of ROUNDS. Raises ArithmeticError where the sum is wrong."""
    best, size = 0.0, dist.get_world_size()
    for _ in range(ROUNDS):
        values = torch.full((NUMBERS,), 1.0, device=device)
        _wait(device)
        began = time.perf_counter()
        dist.all_reduce(values)
        _wait(device)
        best = max(best, values.nbytes / (time.perf_counter() - began))
    if not bool((values == size).all()):
        raise ArithmeticError(f"the sum over {size} ranks on {device} is wrong")
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
