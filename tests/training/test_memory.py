"""What a run leaves in its process: nothing, as the run of another recipe may follow there and needs the room."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from megakd.models.student import Student
from support.runs import KD, ds_config, train


def _living() -> tuple[int, int]:
    """How many parameters and students this process holds: some are other tests'."""
    objects = gc.get_objects()
    return sum(isinstance(it, nn.Parameter) for it in objects), sum(isinstance(it, Student) for it in objects)


@pytest.mark.parametrize(("stage", "mode"), [(0, "replicated"), (2, "replicated"), (3, "zero3")])
def test_a_finished_run_leaves_neither_models_nor_deepspeeds_linear_behind(
    recipe_file: Path, tmp_path: Path, stage: int, mode: str
) -> None:
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = ds_config(tmp_path / "config.json", zero_optimization=zero)
    gc.collect()
    before, linear = _living(), torch.nn.functional.linear
    finished = train(recipe_file, "--out", tmp_path / "run", "--ds_config", config, sets=(*KD, f"teacher.mode={mode}", "optim.steps=3"))
    assert finished.code == 0, finished.err
    assert _living() == before
    assert torch.nn.functional.linear is linear, "DeepSpeed's, which TorchScript cannot compile"
