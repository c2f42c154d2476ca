"""Started on two ranks by the tests: several runs one after the other in one process each, so that Python and DeepSpeed start once.

`train_jobs.py JOBS.json OUTCOMES`: JOBS is a list of command lines of the training program; each rank writes OUTCOMES.RANK.json, a list of
its exit codes or errors. A job may name a step after which rank 1's replica is poisoned with NaN, as failing memory would.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megakd.recipe import load as recipes
from megakd.runtime import launch
from megakd.runtime.checkpoint import Progress
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopRequest
from megakd.training import prepare
from megakd.training import run as training_run
from megakd.training.command import parser


class Poisoned(training_run.Run):
    """A run whose rank 1 loses its mind after saving at `step`."""

    step = 0

    def save(self, progress: Progress) -> None:
        super().save(progress)
        if progress.step == self.step and self.world.rank == 1:
            with torch.no_grad():
                next(self._engine.module.parameters()).fill_(torch.nan)


def _run(arguments: list[str], poison: int | None, world: World, stop: StopRequest) -> dict[str, Any]:
    flags = parser().parse_args(arguments)
    try:
        recipe, name = recipes.load(flags.recipe, flags.overrides)
        plan = prepare.prepare(prepare.RunRequest(recipe, name, flags.ds_config, flags.out, flags.resume), world)
        run = Poisoned(plan, world, stop) if poison else training_run.Run(plan, world, stop)
        run.step = poison or 0
        return {"code": run.execute()}
    except (ValueError, ArithmeticError) as error:
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    world = launch.start()
    stop = StopRequest()
    outcomes = [_run(entry["arguments"], entry.get("poison"), world, stop) for entry in jobs]
    Path(f"{sys.argv[2]}.{world.rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    launch.stop()


if __name__ == "__main__":
    main()
