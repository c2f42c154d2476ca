"""Started on two ranks by `test_started_runs`: a student that each rank draws otherwise, and that the first rank reads the weights of.

`started.py STUDENT.json OUTCOME`: STUDENT has keys of [student]; each rank writes its image tower as OUTCOME.RANK.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from megakd.models import clip
from megakd.models.start.sources import start_of
from megakd.runtime import launch
from support.starts import recipe


def main() -> None:
    world, wanted = launch.start(), recipe(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    assert wanted.student is not None
    description = clip.resolve(wanted.student, "student")
    start = start_of(wanted, description)
    if world.is_main:
        start.fetch()
    torch.manual_seed(world.rank)
    student = clip.build(description, torch.device("cpu")).clip
    start.load(student, (), world)
    tower = {name: value.clone() for name, value in student.state_dict().items() if name.startswith("visual.")}
    save_file(tower, f"{sys.argv[2]}.{world.rank}.safetensors")
    launch.stop()


if __name__ == "__main__":
    main()
