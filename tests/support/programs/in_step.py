"""Started on two ranks by `test_in_step`: runs one after the other, and what each rank holds of them at every checkpoint.

`in_step.py JOBS.json OUTCOMES`: JOBS has command lines of the training program by name; each rank writes OUTCOMES.RANK.json, for each run
its exit code, and by step the SHA-256 of every parameter that is whole on this rank and of what objectives keep from step to step.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from megakd.recipe import load as recipes
from megakd.runtime import launch
from megakd.runtime.checkpoint import Progress
from megakd.runtime.engine import is_partitioned
from megakd.runtime.preemption import StopRequest
from megakd.training import prepare
from megakd.training import run as training_run
from megakd.training.command import parser


class Watched(training_run.Run):
    """A run that notes what this rank holds whenever it saves."""

    def save(self, progress: Progress) -> None:
        super().save(progress)
        whole = {name: value for name, value in self._engine.module.named_parameters() if not is_partitioned(value)}
        kept = {name: value for task in self._tasks for name, value in task.state().items()}
        found = {"parameters": {name: _digest(value) for name, value in whole.items()}, "state": {key: _digest(kept[key]) for key in kept}}
        self.__dict__.setdefault("seen", {})[progress.step] = found


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.detach().cpu().contiguous().float().numpy().tobytes()).hexdigest()


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    world, stop, outcomes = launch.start(), StopRequest(), dict[str, Any]()
    for name, arguments in jobs.items():
        flags = parser().parse_args(arguments)
        recipe, called = recipes.load(flags.recipe, flags.overrides)
        plan = prepare.prepare(prepare.RunRequest(recipe, called, flags.ds_config, flags.out, flags.resume), world)
        run = Watched(plan, world, stop)
        outcomes[name] = {"code": run.execute(), "seen": run.__dict__["seen"]}
    Path(f"{sys.argv[2]}.{world.rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    launch.stop()


if __name__ == "__main__":
    main()
