"""The planner's traffic: closed forms by kind of collective, how messages are counted, and both instruments on real ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megakd.benchmarks import traffic, traffic_side
from megakd.planning import zero
from megakd.runtime.wire import Wire, gathered, reduced, scattered

# 600 trained elements in two weights and 20 small ones, 400 that are not trained; bf16 on 4 ranks
SIZES, FROZEN, RANKS = (400, 200, 12, 8), (400,), 4
KEYS = {"stage3_param_persistence_threshold": 100, "reduce_bucket_size": 250}


def sent(stage: int, *, forwards: int = 1, backwards: int = 1, traced: bool = True, **more: object) -> tuple[Wire, Wire]:
    of = zero.Settings.of({"zero_optimization": {"stage": stage, **KEYS, **more}}, 2)
    return zero.traffic(SIZES, RANKS, of, forwards, backwards, FROZEN, traced=traced)


def test_a_ring_of_each_kind_sends_its_share_and_a_single_rank_nothing() -> None:
    assert gathered(1000, 4, 3) == Wire(all_gather=750, calls=3)
    assert scattered(1000, 4) == Wire(reduce_scatter=750, calls=1)
    assert reduced(1000, 4) == Wire(all_reduce=1500, reductions=1)
    assert gathered(1000, 1) + scattered(1000, 1) + reduced(1000, 1) == Wire()
    assert (gathered(1000, 4) + reduced(1000, 4)).times(2) == Wire(all_gather=1500, all_reduce=3000, calls=2, reductions=2)
    assert (gathered(1000, 4) + Wire(sent=5)).bytes == 755


def test_stages_without_partitioned_weights_reduce_gradients_and_gather_what_was_updated() -> None:
    assert sent(1, forwards=8, backwards=4)[0] == Wire(all_gather=930, all_reduce=1860, calls=2, reductions=3)
    assert sent(2, forwards=8, backwards=4)[0] == Wire(all_gather=930, all_reduce=4 * 1860, calls=2, reductions=4 * 3)


def test_stage_3_gathers_large_weights_in_every_forward_small_ones_once_and_scatters_gradients_in_every_backward() -> None:
    found, near = sent(3, forwards=2, backwards=2)
    assert near == Wire()
    assert found.all_gather == (2 * 2 * 1000 + 2 * 20) * 3 // 4
    assert found.reduce_scatter == 2 * 2 * 620 * 3 // 4
    assert found.all_reduce == found.sent == 0


def test_weights_beyond_what_may_stay_are_gathered_again_in_the_backward() -> None:
    """By reuse distance, which counts both ways; by what is fetched ahead, as far as it may live; all of them without a known order."""
    least = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 10}
    once = sent(3)[0].all_gather
    again = {live: sent(3, **least, stage3_max_live_parameters=live)[0].all_gather - once for live in (0, 300, 1000)}
    assert again == {0: 990 * 2 * 3 // 4, 300: 700 * 2 * 3 // 4, 1000: 0}
    reused = sent(3, **{**least, "stage3_max_reuse_distance": 800}, stage3_max_live_parameters=0)[0].all_gather - once
    assert reused == (1000 - 410) * 2 * 3 // 4
    assert sent(3, traced=False)[0].all_gather - once == 1000 * 2 * 3 // 4
    far, near = sent(3, **least, stage3_max_live_parameters=0, zero_hpz_partition_size=2)
    assert (far.all_gather, near.all_gather) == (once, 990 * 2 // 2)


def test_what_deepspeed_logs_as_messages_becomes_what_a_rank_sends() -> None:
    """Four ranks: of an all-gather a rank's own part is logged and goes to three others."""
    found = {"student all_gather": 100, "loss sent": 7, "run all_reduce": 8, "calls student all_gather": 9}
    found |= {"logger all_gather_into_tensor": 60, "logger all_gather": 40, "logger all_reduce": 200, "logger reduce_scatter_tensor": 400}
    seen, logged = traffic.counted(found, 4)
    assert seen == {"student all_gather": 300, "loss sent": 7, "run all_reduce": 12}
    assert logged == {"all_gather": 300, "all_reduce": 300, "reduce_scatter": 300}


def test_a_plan_that_is_off_by_kind_does_not_hold_though_its_sum_is_right() -> None:
    case = traffic.CASES[0]
    right = {"student all_reduce": 50_000, "teacher all_gather": 50_000}
    swapped = {"student all_reduce": 60_000, "teacher all_gather": 40_000}
    logged = {"all_reduce": 50_000.0, "all_gather": 50_000.0}
    assert traffic.Check(case, right, dict(right), logged).holds
    assert not traffic.Check(case, swapped, dict(right), logged).holds
    assert traffic.Check(case, {**right, "loss all_gather": 900}, dict(right), logged).holds
    assert not traffic.Check(case, {**right, "loss all_gather": 9000}, dict(right), logged).holds


def test_every_collective_of_the_dispatcher_is_counted_by_its_message(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with traffic_side.Collectives() as seen:
            part, whole = torch.ones(6), torch.ones(6)
            dist.all_reduce(part)
            dist.all_gather([whole], part)
            getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(whole, part)
            dist.broadcast(part, 0)
            dist.barrier()
    finally:
        dist.destroy_process_group()
    assert {name.split()[1]: size for name, size in seen.bytes.items()} == {"all_reduce": 24, "all_gather": 48, "broadcast": 24}
    assert sum(seen.calls.values()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZeRO-1, 8-bit teacher over the ranks", "ZeRO-2, micro-batches", "ZeRO-3, little may live at once"])
def test_traffic_of_real_ranks_is_within_5_percent_of_the_plan_by_kind_and_in_sum(name: str) -> None:
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    (case,) = [case for case in traffic.CASES if case.name == name and case.ranks == 2]
    (check,) = traffic.measure([case])
    assert check.holds, check.errors
