"""A program of its own, on every rank: the training program with an eye on its collectives. Started by `traffic.py`.

Arguments: the file for rank 0's counts, the step after which they are taken, the training program, then its own arguments. What is counted
is what happens between the ends of two updates: one whole step.

Two instruments. DeepSpeed's comms logger has what goes through deepspeed.comm, by its own names and message sizes; the losses, sums over
ranks and whatever DeepSpeed 0.19.8 does not wrap pass it by. So every c10d operator is seen at PyTorch's dispatcher too, and told apart
by who is on the stack.
"""

from __future__ import annotations

import inspect
import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megakd.planning.memory_tracker import OperatorTracker
from megakd.runtime.engine import Engine, deepspeed

# c10d's operators, as the planner names them; the place of the argument that the message size of DeepSpeed's logger is of.
OPERATORS = {
    "allreduce_": ("all_reduce", 0), "_allgather_base_": ("all_gather", 1), "allgather_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1), "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1), "broadcast_": ("broadcast", 0), "send": ("sent", 0),
}  # fmt: skip
IGNORED = ("recv_", "barrier", "monitored_barrier_")  # what another rank sends, and what carries nothing


class Collectives(OperatorTracker):
    """`bytes` of messages and `calls` so far, by who sends and by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.calls = Counter[str](), Counter[str]()

    def saw(self, operator: Any, given: tuple[Any, ...], result: Any) -> None:
        space, _, name = operator.name().partition("::")
        if space != "c10d" or name in IGNORED:
            return
        kind, place = OPERATORS[name]
        key = f"{_sender()} {kind}"
        self.bytes[key] += _size(given[place])
        self.calls[key] += 1


def _size(given: Any) -> int:
    return given.nbytes if isinstance(given, Tensor) else sum(map(_size, given))


def _sender() -> str:
    """Of "teacher", "student", "loss" and "run", by the innermost caller outside PyTorch, and whether a partitioned module is running."""
    frame, modules = inspect.currentframe(), list[str]()
    while frame is not None:
        modules.append(str(frame.f_globals.get("__name__")))
        frame = frame.f_back  # type: ignore[assignment]
    own = (__name__, OperatorTracker.__module__)
    caller = next((name for name in modules if name not in own and name.startswith(("deepspeed", "megakd"))), "")
    if caller.startswith("deepspeed"):
        return "teacher" if "megakd.runtime.zero3" in modules else "student"
    return "loss" if caller.startswith(("megakd_kernels", "megakd.objectives")) else "run"


def main(file: Path, step: int, program: str, arguments: list[str]) -> None:
    seen, before = Collectives(), Counter[str]()
    update = Engine.update

    def updated(self: Engine, lr: float) -> None:
        nonlocal before
        update(self, lr)
        found = seen.bytes + Counter({f"calls {name}": times for name, times in seen.calls.items()})
        for name, sizes in deepspeed.comm.comms_logger.get_raw_data().items():
            found[f"logger {name}"] = sum(size * times for size, (times, *_) in sizes.items())
        if self.updates == step and dist.get_rank() == 0:
            whole = file.with_suffix(".part")  # whoever waits for the file finds all of it
            whole.write_text(json.dumps(dict(found - before)), encoding="utf-8")
            whole.replace(file)
        if self.updates == step:
            dist.barrier()  # all have what they wait for
            os._exit(0)  # what is left of the run would be neither counted nor read
        before = found

    Engine.update = updated  # type: ignore[method-assign]
    sys.argv = [program, *arguments]
    with seen:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
