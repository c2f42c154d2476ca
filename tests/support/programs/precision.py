"""Started on two ranks by `test_precision`: what each of them hears where they would compute in different types.

`precision.py FOLDER` writes FOLDER/RANK.json: for each case the error's text, or null.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from megakd.runtime import launch, precision

# Case: device and variable of rank 0, then of rank 1.
CASES: dict[str, list[tuple[str, str]]] = {
    "alike": [("cpu", ""), ("cpu", "")],
    "one was told": [("cpu", "bf16"), ("cpu", "")],
    "told what it does anyway": [("cpu", "fp32"), ("cpu", "")],
    "one has no GPU": [("cuda", ""), ("cpu", "")],
    "one has no GPU but was told": [("cuda", ""), ("cpu", "bf16")],
    "one has a typing mistake": [("cpu", ""), ("cpu", "bfloat")],
}


def main() -> None:
    world = launch.start()
    heard: dict[str, str | None] = {}
    for name, ranks in CASES.items():
        device, os.environ[precision.VARIABLE] = ranks[world.rank]
        try:
            precision.check_alike(torch.device(device), world.size)
            heard[name] = None
        except ValueError as error:
            heard[name] = str(error)
    (Path(sys.argv[1]) / f"{world.rank}.json").write_text(json.dumps(heard), encoding="utf-8")
    launch.stop()


if __name__ == "__main__":
    main()
