"""A tower with batch norm on two ranks: all go by rank 0's running statistics, which are saved, judged and resumed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from support import PROGRAMS
from support.runs import TINY_LLAMA, answering, ds_config, losses, run_ranks, settings, zero

RESNET = "student.architecture.vision_cfg={ image_size = 64, layers = [1, 1, 1, 1], width = 8, head_width = 16 }"
STEPS = ("optim.steps=3", "optim.warmup=0", "optim.batch=8")
SETS = ("evaluation.batch=7", "evaluation.retrieval.test={world}/test/*.tar")


class Runs:
    """Run folders by name, and what each rank's batch norm went by."""

    def __init__(self, folder: Path, ranks: list[dict[str, dict[str, Any]]]) -> None:
        self.folder, self.ranks = folder, ranks

    def of(self, name: str, mode: str) -> list[list[list[float]]]:
        """By rank."""
        return [rank[name][mode] for rank in self.ranks]


@pytest.fixture(scope="module")
def runs(recipe_file: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("statistics")
    partitioned = ds_config(folder / "z3.json", zero_optimization=zero(3))
    questions = (f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer", *answering(world), "answers.tower=trained")
    frozen = (*questions, "answers.tower=frozen")
    sets = tuple(item.format(world=world) for item in SETS)
    jobs = {
        "pairs": sets,
        "questions": questions,
        "questions_stage3": questions,
        "frozen_often": (*frozen, "evaluation.every=1"),
        "frozen_seldom": frozen,
        "frozen_resumed": frozen,
    }
    resumed = ("--resume", str(folder / "frozen_seldom" / "checkpoints" / "step_00000002"))
    commands = {
        name: [
            *("--recipe", str(recipe_file), "--out", str(folder / name), *settings(RESNET, *STEPS, *own)),
            *(("--ds_config", str(partitioned)) if name.endswith("stage3") else ()),
            *(resumed if name.endswith("resumed") else ()),
        ]
        for name, own in jobs.items()
    }
    (folder / "jobs.json").write_text(json.dumps(commands), encoding="utf-8")
    run_ranks(PROGRAMS / "rank_statistics.py", folder / "jobs.json", folder / "outcomes")
    ranks = [json.loads((folder / f"outcomes.{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert all(outcome.get("code") == 0 for rank in ranks for outcome in rank.values()), ranks
    return Runs(folder, ranks)


def test_every_step_begins_with_rank_0s_statistics(runs: Runs) -> None:
    first, second = runs.of("pairs", "trained")
    assert len(first) > 2
    assert first == second


@pytest.mark.parametrize("name", ["pairs", "questions", "questions_stage3"])
def test_every_rank_is_judged_with_the_statistics_that_are_saved(runs: Runs, name: str) -> None:
    judged = runs.of(name, "judged")
    assert judged[0] == judged[1]
    saved = load_file(runs.folder / name / "model" / "open_clip_model.safetensors")
    assert judged[0][-2:] == [saved[f"visual.bn{number}.running_mean"].tolist() for number in (1, 2)]


def test_evaluations_change_no_statistics(runs: Runs) -> None:
    """A frozen tower is read with them in training."""
    assert losses(runs.folder / "frozen_often") == losses(runs.folder / "frozen_seldom")
    assert runs.of("frozen_often", "trained") == runs.of("frozen_seldom", "trained")


def test_a_resumed_run_goes_on_with_the_statistics_of_an_undisturbed_one(runs: Runs) -> None:
    whole, resumed = (losses(runs.folder / name) for name in ("frozen_seldom", "frozen_resumed"))
    assert resumed == whole[2:]
