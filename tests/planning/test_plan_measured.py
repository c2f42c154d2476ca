"""The plan's memory against measured runs of the real program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.benchmarks import plan_check
from megakd.planning import plan as planner
from megakd.planning.memory_tracker import MemoryTracker
from megakd.recipe import load as recipes
from megakd.runtime.engine import Engine
from megakd.training.tasks.answer_teacher import LanguageTeacher
from megakd.training.tasks.distill import Distill
from megakd.training.trainer import Trainer
from support.runs import train

# Large enough that a step's tensors outweigh what the loader and the log make beside it.
MODELS = (
    "student.architecture={ embed_dim = 128, vision_cfg = { image_size = 64, patch_size = 8, width = 256, layers = 4, head_width = 32 }, "
    "text_cfg = { context_length = 32, vocab_size = 128, width = 128, heads = 4, layers = 3 } }",
    "teacher.architecture={ embed_dim = 192, vision_cfg = { image_size = 96, patch_size = 8, width = 384, layers = 4, head_width = 32 }, "
    "text_cfg = { context_length = 32, vocab_size = 49408, width = 192, heads = 4, layers = 3 } }",
    "teacher.pretrained=random",
    "objectives.similarity=1.0",
)


class Peaks:
    """Peak bytes of each method that a step calls, the largest over all steps."""

    def __init__(self, watch: MemoryTracker, patch: pytest.MonkeyPatch) -> None:
        self.watch, self.bytes = watch, dict[str, int]()
        for owner, method, place in ((Distill, "teach", "teacher"), (LanguageTeacher, "read", "teacher"),
                                     (Trainer, "_forward", "student forward"), (Trainer, "_losses", "loss"),
                                     (Engine, "backward", "backward"), (Engine, "reduce", "backward"),
                                     (Engine, "update", "update")):  # fmt: skip
            patch.setattr(owner, method, self._counted(getattr(owner, method), place))

    def _counted(self, method: Any, place: str) -> Any:
        def call(*args: Any) -> Any:
            self.watch.restart()
            result = method(*args)
            self.bytes[place] = max(self.bytes.get(place, 0), self.watch.peak)
            return result

        return call


def _places(
    sets: tuple[str, ...], micro: int, recipe_file: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes at each place of a step of 32 pairs: counted by the lives of all tensors of the real program, and as the plan says."""
    sets = (*MODELS, "optim.batch=32", "optim.steps=2", "optim.warmup=0", *sets)
    config = tmp_path / "config.json"
    config.write_text(f'{{"train_micro_batch_size_per_gpu": {micro}}}', encoding="utf-8")
    watch = MemoryTracker("cpu")
    peaks = Peaks(watch, patch)
    with watch:
        done = train(recipe_file, "--ds_config", config, "--out", tmp_path / "run", sets=sets)
    assert done.code == 0, done.err
    plan = planner.plan(*recipes.load(str(recipe_file), sets), str(config), planner.Cluster(1, 8, kind="cpu"))
    assert plan.rows[0].mode.name == "replicated fp32"
    return peaks.bytes, plan.rows[0].places


@pytest.mark.parametrize(("checkpointing", "micro"), [(False, 32), (True, 8)])
def test_every_place_of_a_step_holds_what_the_plan_says(
    checkpointing: bool, micro: int, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = (f"student.activation_checkpointing={str(checkpointing).lower()}",)
    found, said = _places(sets, micro, recipe_file, tmp_path, monkeypatch)
    assert found == pytest.approx(said, rel=plan_check.TOLERANCE)


@pytest.mark.parametrize("micro", [32, 8])
def test_patch_tokens_are_counted_from_the_teachers_forward_to_the_end_of_the_step(
    micro: int, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's, and what the student's heads give: several micro-batches keep these joined, with a gradient, beside the parts."""
    sets = ("objectives.patch=1", "patch.blocks=[-1, -2]")
    found, said = _places(sets, micro, recipe_file, tmp_path, monkeypatch)
    assert found == pytest.approx(said, rel=0.06)


@pytest.mark.slow
def test_resident_memory_of_real_runs_is_what_the_plan_says() -> None:
    for check in plan_check.measure(plan_check.CASES):
        assert abs(check.error) < plan_check.TOLERANCE, check


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: compares with torch.cuda.max_memory_allocated")
def test_allocated_memory_on_a_gpu_is_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        monkeypatch.delenv("DS_ACCELERATOR")  # conftest's, for the runs in this process
    for check in plan_check.measure([case for case in plan_check.CASES if case.ranks == 1]):
        assert abs(check.error) < plan_check.TOLERANCE, check
