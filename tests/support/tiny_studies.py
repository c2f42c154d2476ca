"""A study of seconds a run, on a world of 96 pairs: two teachers, two methods, two seeds; small is one of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megakd.study.results import STUDY

FILE = """
title = "tiny"
base = "smoke"
seeds = [0, 1]
set = { optim = { steps = 4, warmup = 1, batch = 16 }, data = { workers = 0 }, checkpoint = { every = 2 } }
evaluation = { zero_shot = {}, hard_negatives = {} }

[world]
folder = "world"
train = 96
test = 16

[teachers.weak]
recipe = "smoke_teacher"
set = { optim = { steps = 2, warmup = 1, batch = 16 }, data = { workers = 0 } }
teacher = { patch_grid = [3, 3] }

[teachers.strong]
recipe = "smoke_teacher"
set = { optim = { steps = 5, warmup = 1, batch = 16 }, data = { workers = 0 } }
teacher = { patch_grid = [3, 3] }

[methods.plain]
teacher = false

[methods.patch]
set = { objectives = { patch = 1.0 } }

[controls]
random = false

[small]
teachers = ["weak"]
seeds = [0]

[[scores]]
name = "R@1"
path = "retrieval/test/mean_R@1"
"""
CELLS = 6  # plain and two teachers, each with two seeds; small: plain and one teacher


def scores(out: Path) -> dict[str, Any]:
    """Scores of every cell and teacher of a study that is done, by name."""
    content = json.loads((out / STUDY).read_text())
    rows = {row["id"]: row for row in content["cells"]} | {row["name"]: row for row in content["teachers"]}
    found = {}
    for name, row in rows.items():
        assert row["status"] == "done", row
        results = json.loads((out / row["folder"] / "evaluation.json").read_text())
        found[name] = {key: results[key] for key in ("step", "retrieval")}
    return found
