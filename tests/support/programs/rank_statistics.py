"""Started on two ranks by `test_rank_statistics`: runs one after the other, and the batch norm statistics that each rank went by.

`rank_statistics.py JOBS.json OUTCOMES`: JOBS has command lines of the training program by name; each rank writes OUTCOMES.RANK.json, for
each run its exit code and the running means of its tower's first batch norm, in training and in evaluation mode, in the order of forwards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from megakd.runtime import launch
from megakd.runtime.preemption import StopRequest
from support.programs.train_jobs import _run


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    seen: dict[bool, list[list[float]]] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        # the stem's first two, where the tower has a width of 8; on meta the run only measures its shapes
        if isinstance(module, nn.BatchNorm2d) and module.num_features == 4 and module.running_mean is not None:
            found = seen.setdefault(module.training, [])
            if not module.running_mean.is_meta and (mean := module.running_mean.tolist()) not in found:
                found.append(mean)

    register_module_forward_pre_hook(note)
    world, stop = launch.start(), StopRequest()
    outcomes = {}
    for name, arguments in jobs.items():
        seen.clear()
        outcome = _run(arguments, None, world, stop)
        outcomes[name] = {**outcome, "trained": seen.get(True, []), "judged": seen.get(False, [])}
    Path(f"{sys.argv[2]}.{world.rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    launch.stop()


if __name__ == "__main__":
    main()
