"""The planner's formulas for DeepSpeed against what real engines hold on two ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megakd.planning import zero
from support import PROGRAMS
from support.programs.zero import LAYERS, WIDTH
from support.runs import run_ranks

RANKS = 2
SIZES = tuple(size for _ in range(LAYERS // 2) for size in (2 * WIDTH * WIDTH, 2 * WIDTH, 2 * WIDTH * WIDTH, WIDTH))
BUCKET = {"reduce_bucket_size": 200_000, "allgather_bucket_size": 200_000}
STAGE_3 = {"stage3_param_persistence_threshold": 1000, "stage3_prefetch_bucket_size": 1000}
BF16 = {"bf16": {"enabled": True}}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero2": {"zero_optimization": {"stage": 2, **BUCKET}},
    "zero3": {"zero_optimization": {"stage": 3, **BUCKET, **STAGE_3}},
    "zero1 bf16": {**BF16, "zero_optimization": {"stage": 1, **BUCKET}},
    "zero2 bf16": {**BF16, "zero_optimization": {"stage": 2, "overlap_comm": True, **BUCKET}},
    "zero3 bf16": {**BF16, "zero_optimization": {"stage": 3, **BUCKET, **STAGE_3}},
}
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
CONFIGS |= {f"{name}, sums in fp32": {**CONFIGS[name], **SUMS} for name in ("zero1 bf16", "zero2 bf16", "zero3 bf16")}
CONFIGS["zero1 bf16, sums in fp32"]["communication_data_type"] = "fp32"
AVERAGED = ("zero2 bf16", "zero3 bf16")
CONFIGS |= {f"{name}, averaged": {**CONFIGS[name], "ema": True} for name in AVERAGED}
# The last, as later engines of the process would take its groups; `start` is before the first step, when the second copies are there.
HPZ = "zero3 bf16, hpz"
CONFIGS[HPZ] = {**BF16, "zero_optimization": {"stage": 3, **BUCKET, **STAGE_3, "zero_hpz_partition_size": RANKS}}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    first, _ = run_ranks(PROGRAMS / "zero.py", *map(json.dumps, CONFIGS.values()))
    (line,) = [line for line in first.splitlines() if line.startswith("RESULTS")]
    return dict(zip(CONFIGS, json.loads(line.removeprefix("RESULTS")), strict=True))


def planned(name: str) -> zero.Held:
    element = 2 if "bf16" in name else 4
    return zero.held(SIZES, RANKS, zero.Settings.of(CONFIGS[name], element), averages="ema" in CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_optimizer_and_standing_buffers_are_those_of_a_real_engine(name: str, measured: dict[str, dict[str, int]]) -> None:
    """To 0.2 %: DeepSpeed pads flat groups and keeps some scalars."""
    held = planned(name)
    assert held.weights + held.optimizer + held.standing == pytest.approx(measured[name]["start"], rel=2e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_update_takes_what_a_real_engine_takes(name: str, measured: dict[str, dict[str, int]]) -> None:
    assert planned(name).updating == pytest.approx(measured[name]["update"], rel=0.02)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != HPZ])
def test_gradients_gathered_weights_and_reduction_are_at_most_a_tenth_of_all_off(name: str, measured: dict[str, dict[str, int]]) -> None:
    """Activations are nothing here. `keeps` counts gradients in the student's own backward as well, so the larger of both is planned."""
    held = planned(name)
    assert held.gathered + held.gradients + held.reducing == pytest.approx(measured[name]["backward"], abs=0.1 * measured[name]["start"])


@pytest.mark.parametrize("name", AVERAGED)
def test_an_average_of_the_weights_takes_four_bytes_of_a_rank_for_each_of_its_share(name: str, measured: dict[str, dict[str, int]]) -> None:
    share = sum(SIZES) // RANKS
    assert measured[f"{name}, averaged"]["start"] - measured[name]["start"] == pytest.approx(4 * share, rel=0.01)
    assert planned(f"{name}, averaged").optimizer - planned(name).optimizer == 4 * share


def test_second_copies_are_planned_for_every_weight(measured: dict[str, dict[str, int]]) -> None:
    """Half of all weights on each of two ranks, once more. Those that stay gathered until the backward have none: less than planned."""
    held, without = planned(HPZ), planned("zero3 bf16")
    assert held.weights == 2 * without.weights
    assert measured[HPZ]["start"] - measured["zero3 bf16"]["start"] == pytest.approx(without.weights, rel=0.01)
    peak = measured[HPZ]["start"] + measured[HPZ]["backward"]
    assert peak < held.weights + held.optimizer + held.standing + held.gathered + held.gradients + held.reducing < 1.15 * peak


def test_a_step_leaves_nothing_behind(measured: dict[str, dict[str, int]]) -> None:
    """But for one reduction bucket that overlapping keeps."""
    for found in measured.values():
        assert found["end"] <= found["start"] + 2 * 200_000
