"""Everything on: all objectives with their heads and statistics, two teachers of unlike size, whose scales and weights move, the larger in
8 bit and partitioned, on two ranks in micro-batches. After 20 steps the ranks hold the same bits, and a run that goes on has them too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megakd.runtime import checkpoint
from support import PROGRAMS
from support.runs import ENSEMBLE, EVERY_OBJECTIVE, TRAIN, curve, ds_config, ran, rows, run_ranks, settings, zero

STEPS, MIDDLE = 20, 10
EVERYTHING = (
    *EVERY_OBJECTIVE,
    "teacher.mode=zero3_int8",
    ENSEMBLE[0][:-2] + ", init_logit_bias = -2.5 }",
    ENSEMBLE[1],
    "teacher.scale=matched",
    "ensemble.second.weight=0.5",
    "schedules.ensemble.second.weight={ shape = 'linear', end = 3.0 }",
    "schedules.similarity.temperature={ shape = 'cosine', start = 2.0, end = 1.0 }",
    "objectives.masked_feature=0.3",
    "interactive={ head = 'mlp', scale = 'own' }",
    "patch={ blocks = [-1], standardise = 'phi_s', statistics = 15, loss = 'smooth_l1' }",  # still gathered where the run goes on
    f"optim.steps={STEPS}",
    f"checkpoint.every={MIDDLE}",
    "checkpoint.keep=9",
)
STAGES = (2, 3)
pytestmark = pytest.mark.timeout(600)


class Runs:
    """Run folders by name, and what each rank held of them."""

    def __init__(self, folder: Path, ranks: list[dict[str, dict[str, Any]]]) -> None:
        self.folder, self.ranks = folder, ranks


@pytest.fixture(scope="module")
def runs(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder, commands = tmp_path_factory.mktemp("in_step"), {}
    for stage in STAGES:
        pieces = ds_config(folder / f"stage{stage}.json", zero_optimization=zero(stage), gradient_accumulation_steps=2)
        shared = ("--recipe", str(recipe_file), "--ds_config", str(pieces), *settings(*EVERYTHING))
        commands[f"whole{stage}"] = [*shared, "--out", str(folder / f"whole{stage}")]
        middle = folder / f"whole{stage}" / "checkpoints" / f"step_{MIDDLE:08d}"
        commands[f"resumed{stage}"] = [*shared, "--out", str(folder / f"resumed{stage}"), "--resume", str(middle)]
    (folder / "jobs.json").write_text(json.dumps(commands), encoding="utf-8")
    run_ranks(PROGRAMS / "in_step.py", folder / "jobs.json", folder / "outcomes", seconds=540)
    ranks = [json.loads((folder / f"outcomes.{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert all(outcome["code"] == 0 for rank in ranks for outcome in rank.values())
    return Runs(folder, ranks)


@pytest.mark.parametrize("stage", STAGES)
def test_heads_and_statistics_are_the_same_bits_on_all_ranks_after_twenty_steps(runs: Runs, stage: int) -> None:
    first, second = (rank[f"whole{stage}"]["seen"][str(STEPS)] for rank in runs.ranks)
    assert first == second
    places = {tuple(name.split(".")[:2]) for name in first["state"]}
    assert places == {("patch", "0"), ("patch", "1"), ("teacher_scale", "teacher")}
    heads = {name for name in first["parameters"] if name.startswith("heads.")}
    assert bool(heads) == (stage == 2)  # of stage 3 there is one copy
    assert {row["step"] for row in rows(runs.folder / f"whole{stage}")} == set(range(1, STEPS + 1))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_goes_on_has_the_bits_of_an_undisturbed_one(runs: Runs, stage: int) -> None:
    whole, resumed = (runs.folder / f"{name}{stage}" for name in ("whole", "resumed"))
    assert curve(resumed) == curve(whole)[MIDDLE:]
    for rank in runs.ranks:
        assert rank[f"resumed{stage}"]["seen"][str(STEPS)] == rank[f"whole{stage}"]["seen"][str(STEPS)]
    (_, one), (_, other) = (checkpoint.load(checkpoint.available(run)[-1]) for run in (whole, resumed))
    for kind in ("weights", "moments", "objectives"):
        own, again = getattr(one, kind), getattr(other, kind)
        assert own.keys() == again.keys() != set()
        assert all(bool((own[name] == again[name]).all()) for name in own), kind


def test_partitioning_the_student_changes_nothing_but_rounding(runs: Runs) -> None:
    two, three = (rows(runs.folder / f"whole{stage}")[0]["losses"] for stage in STAGES)
    assert len(two) == len([setting for setting in EVERYTHING if setting.startswith("objectives.")]) + 1
    assert two == pytest.approx(three, rel=1e-4)


def test_four_micro_batches_have_the_losses_and_the_gradient_of_one(recipe_file: Path, tmp_path: Path) -> None:
    """All but masked images, which are drawn by micro-batch."""
    sets = (*EVERYTHING, "objectives.masked_feature=0", "optim.steps=1", "optim.warmup=0", "teacher.mode=replicated")
    found = {}
    for pieces in (1, 4):
        config = ds_config(tmp_path / f"{pieces}.json", gradient_accumulation_steps=pieces)
        (found[pieces],) = rows(ran(recipe_file, tmp_path / str(pieces), *sets, config=config))
    assert found[4]["losses"] == pytest.approx(found[1]["losses"], rel=1e-6)
    assert found[4]["gradient_norm"] == pytest.approx(found[1]["gradient_norm"], rel=1e-5)


def test_three_ranks_learn_what_one_learns(recipe_file: Path, tmp_path: Path) -> None:
    shared = (*EVERYTHING, "objectives.masked_feature=0", "optim.steps=2", "optim.warmup=0", "optim.batch=12")
    alone = ran(recipe_file, tmp_path / "alone", *shared, "teacher.mode=replicated_int8")
    config = ds_config(tmp_path / "pieces.json", zero_optimization=zero(2), gradient_accumulation_steps=2)
    run_ranks(TRAIN, "--recipe", recipe_file, "--out", tmp_path / "three", "--ds_config", config, *settings(*shared), ranks=3)
    for found, expected in zip(rows(tmp_path / "three"), rows(alone), strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
