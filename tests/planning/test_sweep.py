"""`megakd plan --sweep`: times worked by hand, the plan's own numbers at each count, what is refused and what is said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from test_planner import ZERO1, recipe

from megakd.planning import plan as planner
from megakd.planning import rates, sweep, sweep_report
from megakd.planning.cluster import Cluster
from megakd.planning.scaling import Scaling
from megakd.recipe import Recipe
from megakd.runtime.wire import Wire
from support.runs import megakd

NODES = Cluster(memory=80)
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 128, "width": 64, "heads": 2, "layers": 2},
}


def tiny() -> Recipe:
    return recipe(student={"architecture": TINY}, teacher={"architecture": TINY, "pretrained": "random"})


@pytest.fixture(scope="module")
def strong() -> sweep.Sweep:
    return sweep.sweep(tiny(), "test", ZERO1, NODES, Scaling(sweep="32,8"))


@pytest.fixture(scope="module")
def weak() -> sweep.Sweep:
    return sweep.sweep(tiny(), "test", ZERO1, NODES, Scaling(sweep="8,32", scaling="weak", images=0))


def test_each_count_has_the_numbers_of_its_plan(strong: sweep.Sweep) -> None:
    assert [point.gpus for point in strong.points] == [8, 32]
    plan = planner.plan(tiny(), "test", ZERO1, Cluster(32, 80))
    assert strong.points[1].plan.to_json() == plan.to_json()
    assert strong.points[1].best == plan.recommended


def test_a_step_is_computing_and_what_nothing_hides(strong: sweep.Sweep) -> None:
    """ZeRO-1 of two nodes and more: half of the gradients' reduction hides, weights and losses are gathered meanwhile by nobody."""
    for point in strong.points:
        row, step = point.row("replicated bf16"), point.steps["replicated bf16"]
        of = rates.gpu("h100")
        assert step.teacher == pytest.approx(row.flops["teacher"] / of.flops / 0.5)
        assert step.student == pytest.approx(row.flops["student"] / of.flops / 0.4)
        own, loss = row.sent["student"], row.sent["loss"]
        reducing = sweep.seconds(Wire(all_reduce=own.all_reduce, reductions=own.reductions), point.gpus, 8, of, strong.assumed)
        every = sweep.seconds(own + loss, point.gpus, 8, of, strong.assumed)
        assert step.hidden == pytest.approx(min(reducing / 2, step.student))
        assert step.waited == pytest.approx(every - step.hidden)
        busy = step.teacher + step.student + step.loss + step.update + step.waited
        assert step.data == pytest.approx(max(0.0, 4096 / point.gpus / (400 * tiny().data.workers) - busy))
        assert step.total == pytest.approx(busy + step.data)


def test_teachers_blocks_travel_beside_its_forward(strong: sweep.Sweep) -> None:
    point = strong.points[1]
    whole, shared = (point.steps[name] for name in ("replicated bf16", "zero3 bf16"))
    fetching = sweep.seconds(point.row("zero3 bf16").sent["teacher"], 32, 8, rates.gpu("h100"), strong.assumed)
    assert shared.hidden - whole.hidden == pytest.approx(min(fetching / 2, shared.teacher))
    assert shared.waited - whole.waited == pytest.approx(fetching - min(fetching / 2, shared.teacher))


def test_collectives_take_their_bytes_and_their_hops() -> None:
    """32 ranks on 4 nodes: 28 hops inside and 3 between; a node of 8 cards of 50 GB/s is slower than the links inside."""
    of, assumed = rates.gpu("h100"), Scaling()
    around = 28 * 3.4 + 3 * 9.6
    assert sweep.seconds(Wire(all_gather=10**9, calls=2), 32, 8, of, assumed) == pytest.approx(1e9 / 280e9 + 2e-6 * (8.4 + around))
    assert sweep.seconds(Wire(sent=10**9), 8, 8, of, assumed) == pytest.approx(1e9 / 315e9)
    tree = 2 * (7 * 3.4 + 2 * 9.6)
    assert tree < 2 * around
    assert sweep.seconds(Wire(reductions=1), 32, 8, of, assumed) == pytest.approx(1e-6 * (8.4 + tree))
    assert sweep.seconds(Wire(all_reduce=10**9, reductions=3), 1, 8, of, assumed) == 0


def test_strong_scaling_keeps_the_batch_and_weak_scaling_the_pairs_of_a_gpu(strong: sweep.Sweep, weak: sweep.Sweep) -> None:
    assert [point.samples for point in strong.points] == [4096, 4096]
    assert [point.samples for point in weak.points] == [4096, 4 * 4096]
    for found in (strong, weak):
        for point in found.points:
            rate = point.samples / point.steps["replicated bf16"].total
            assert point.rate("replicated bf16") == rate
        first, last = (point.rate("replicated bf16") / point.gpus for point in found.points)
        assert found.efficiency(found.points[0], "replicated bf16") == 1
        assert found.efficiency(found.points[1], "replicated bf16") == pytest.approx(last / first)
        assert last <= first
    assert all(step.data == 0 for point in weak.points for step in point.steps.values())


def test_the_tables_name_what_was_assumed_and_the_json_has_every_mode(
    strong: sweep.Sweep, weak: sweep.Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_report.show(strong, tmp_path / "sweep.json")
    shown = capsys.readouterr().out
    for words in (
        "989 TFLOP/s",
        "50% in the teacher",
        "450 GB/s",
        "9.6 us",
        "50% of what can run",
        "400 images/s",
        "strong scaling",
        "best",
    ):
        assert words in shown
    assert "nobody has published" not in shown
    stored = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert stored["assumptions"]["overlap"] == 0.5
    assert stored["assumptions"]["gpu"]["network"] == 50e9
    assert [len(point["modes"]) for point in stored["points"]] == [len(point.steps) for point in strong.points]
    assert stored["points"][0]["modes"][0]["efficiency"] == 1
    assert math.isclose(stored["points"][1]["modes"][0]["step"]["total"], strong.points[1].steps["replicated bf16"].total)
    sweep_report.show(sweep.sweep(tiny(), "test", ZERO1, Cluster(memory=2.1), Scaling(sweep="8")))
    assert "on 8 GPUs nothing fits: even" in capsys.readouterr().out
    sweep_report.show(weak)
    assert "the loader is never waited for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "cluster", "message"),
    [
        ({"sweep": "8,many"}, NODES, "--sweep 8,many: 'many' is not a number of GPUs"),
        ({"sweep": "8,2.5"}, NODES, r"'2\.5' is not a number"),
        ({"sweep": "0,8"}, NODES, "'0' is not a number"),
        ({"sweep": "8,,16"}, NODES, "'' is not a number"),
        ({"sweep": "8,60"}, NODES, "60 GPUs do not fill nodes of 8; use 56 or 64"),
        ({"sweep": "8,8"}, NODES, "a count stands twice"),
        ({"sweep": "8,16"}, Cluster(8, 80), "--gpus 8: --sweep 8,16 says how many"),
        ({"sweep": "8", "scaling": "week"}, NODES, "--scaling 'week': strong or weak"),
        ({"sweep": "8", "overlap": 1.5}, NODES, r"--overlap 1\.5"),
        ({"sweep": "8", "training_share": 0.0}, NODES, r"--training_share 0\.0"),
        ({"sweep": "8", "network": -1.0}, NODES, r"--network -1\.0"),
        ({"sweep": "8", "images": -1.0}, NODES, r"--images -1\.0"),
        ({"overlap": 0.7}, Cluster(8, 80), "--overlap: goes with --sweep"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, object], cluster: Cluster, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scaling(**given).check(cluster)  # type: ignore[arg-type]


def test_counts_below_a_node_need_not_fill_one() -> None:
    assert Scaling(sweep=" 16, 2").check(NODES) == (2, 16)
    assert Scaling(sweep="12").check(Cluster(memory=80, per_node=4)) == (12,)
    assert Scaling().check(Cluster(8, 80)) == ()


def test_a_rank_without_a_pair_is_refused_before_anything_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"optim\.batch = 4096 leaves less than one to each of 8192 GPUs"):
        sweep.sweep(tiny(), "test", ZERO1, NODES, Scaling(sweep="8192"))
    with pytest.raises(ValueError, match="does not divide over the smallest count"):
        sweep.sweep(tiny(), "test", ZERO1, Cluster(memory=80, per_node=3), Scaling(sweep="3", scaling="weak"))
    assert megakd("plan", "--recipe", "smoke", "--gpu_memory", 80, "--sweep", "8,nine") == 2
    assert "'nine' is not a number of GPUs" in capsys.readouterr().err
