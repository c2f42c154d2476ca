"""`megakd plan`: FLOPs and bytes against numbers worked by hand, what fits, and what is said about it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megakd.models.embeddings import Embeddings
from megakd.models.int8 import matmul
from megakd.models.int8.linear import Int8Linear
from megakd.objectives.base import head_name
from megakd.objectives.cost import LossShape
from megakd.objectives.set import ObjectiveSet
from megakd.planning import models, rates, report, zero
from megakd.planning import plan as planner
from megakd.planning.memory_tracker import MemoryTracker
from megakd.recipe import Recipe, Teacher
from megakd.runtime.wire import Wire
from support.runs import REPOSITORY, environment

ZERO1 = str(REPOSITORY / "ds_configs" / "zero1_bf16.json")
CLUSTER = planner.Cluster(16, 80)


def recipe(**changes: object) -> Recipe:
    settings = {
        "name": "plan",
        "data": {"train": "none.tar"},
        "student": {"model": "ViT-S-32"},
        "teacher": {"model": "ViT-B-32", "pretrained": "random"},
        "objectives": {"contrastive": 1.0, "similarity": 1.0},
        "optim": {"steps": 10, "batch": 4096, "lr": 1e-3},
        **changes,
    }
    return Recipe.model_validate(settings)


def planned(cluster: planner.Cluster = CLUSTER, **changes: object) -> planner.Plan:
    return planner.plan(recipe(**changes), "test", ZERO1, cluster)


@pytest.fixture(scope="module")
def small() -> planner.Plan:
    return planned()


@pytest.fixture(scope="module")
def checkpointed() -> planner.Plan:
    return planned(student={"model": "ViT-S-32", "activation_checkpointing": True})


def by_name(plan: planner.Plan) -> dict[str, planner.Row]:
    return {row.mode.name: row for row in plan.rows}


def vit_flops(width: int, layers: int, tokens: int, embed: int, mlp: int = 4) -> int:
    """2 a multiply-add: q, k, v and output projections, two attention products, an MLP of two layers; one projection at the end."""
    block = tokens * width * width * (4 + 2 * mlp) + 2 * tokens * tokens * width
    return 2 * (layers * block + width * embed)


def test_diagnostics_beside_a_store_are_said_with_the_teachers_memory(
    small: planner.Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"diagnostics": {"test": "none.tar"}}
    store = {"model": "ViT-B-32", "pretrained": "random", "store": "somewhere"}
    plan = planned(teacher=store, evaluation=sets)
    weights = by_name(small)["replicated bf16"].parts["teacher weights"]
    assert plan.beside is not None
    assert f"replicated bf16: {weights / 1e9:.2f} GB of each GPU more than store" in plan.beside
    report.show(plan, tmp_path / "plan.json")
    assert plan.beside in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["beside"] == plan.beside
    assert planned(teacher=store).beside is planned(evaluation=sets).beside is None


def test_the_shares_of_a_mixture_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    sources = {"web": {"shards": "w.tar", "weight": 3}, "clean": {"shards": "c.tar", "weight": 1}}
    report.show(planned(data={"train": sources}))
    assert "data.train: web 75.00%, clean 25.00% of each batch" in capsys.readouterr().out


def test_the_flops_of_a_vit_are_those_of_the_formula(small: planner.Plan) -> None:
    """ViT-B-32 at 224: 49 patches and a class token; text 77 tokens of width 512. open_clip's own profile says 14.78 GFLOP (of 2)."""
    patches = 2 * 49 * 3 * 32 * 32 * 768
    assert small.job.teachers[0].image.flops == vit_flops(768, 12, 50, 512) + patches
    assert small.job.teachers[0].text.flops == vit_flops(512, 12, 77, 512)


def test_a_named_model_of_another_image_size_is_counted_with_its_patches() -> None:
    plan = planned(
        student={"model": "ViT-S-32", "image_size": 448}, teacher={"model": "ViT-B-32", "pretrained": "random", "image_size": [64, 96]}
    )
    assert plan.job.teachers[0].image.flops == vit_flops(768, 12, 1 + 2 * 3, 512) + 2 * 6 * 3 * 32 * 32 * 768
    own, text = planned().job.student, vit_flops(384, 12, 77, 384)
    assert plan.job.student.flops - text == vit_flops(384, 12, 1 + 14 * 14, 384) + 2 * 196 * 3 * 32 * 32 * 384
    assert plan.job.student.saved > 2 * own.saved


def test_a_training_step_costs_three_forwards_and_one_more_where_blocks_are_computed_again(
    small: planner.Plan, checkpointed: planner.Plan
) -> None:
    assert small.rows[0].flops["student"] == 3 * small.job.student.flops * 256
    assert checkpointed.rows[0].flops["student"] == 4 * small.job.student.flops * 256


def test_activation_checkpointing_saves_most_of_the_activations(small: planner.Plan, checkpointed: planner.Plan) -> None:
    assert checkpointed.rows[0].parts["student activations"] < 0.3 * small.rows[0].parts["student activations"]


def test_weights_of_the_teacher_by_mode(small: planner.Plan) -> None:
    """151.3 M parameters. bf16 as open_clip makes it: embeddings, norms and positions stay in float32."""
    rows, cost = by_name(small), small.job.teachers[0]
    wide, int8 = rows["replicated bf16"].parts["teacher weights"], rows["replicated int8"].parts["teacher weights"]
    matrices = 12 * 12 * (768**2 + 512**2)
    scales = 4 * 12 * 9 * (768 + 512)
    assert wide - int8 == matrices - scales
    kept, kept_int8 = (sum(form.kept for form in forms) for forms in zip(*((t.wide, t.int8) for t in (cost.image, cost.text)), strict=True))
    assert rows["zero3 bf16"].parts["teacher weights"] == pytest.approx(kept + (wide - kept) / 16, abs=1)
    assert kept_int8 - kept == pytest.approx(scales, abs=60_000)  # and non-persistent causal masks, positions
    assert rows["zero3 int8 + offload"].parts["teacher weights"] == kept_int8
    assert rows["zero3 int8 + offload"].host == pytest.approx((int8 - kept_int8) / 16, abs=1)
    assert rows["replicated bf16, text from store"].parts["teacher weights"] < wide - 2 * 37_000_000
    assert rows["store"].parts["teacher weights"] == rows["store"].flops["teacher"] == 0


def test_calibrated_int8_has_a_factor_an_input_and_its_products_temporaries_are_counted(small: planner.Plan) -> None:
    teacher = {"model": "ViT-B-32", "pretrained": "random", "mode": "zero3_int8", "calibration": 64}
    calibrated, plain = by_name(planned(teacher=teacher)), by_name(small)
    factors = 4 * 12 * 7 * (768 + 512)  # of q, k and v together, their output, and both layers of the MLP
    weights = "teacher weights"
    assert calibrated["replicated int8"].parts[weights] - plain["replicated int8"].parts[weights] == factors
    assert calibrated["replicated bf16"].parts == plain["replicated bf16"].parts
    widened = {"model": "ViT-B-32", "pretrained": "random", "mode": "zero3_int8", "int8_product": "dequantise"}
    by_integers, by_widening = (by_name(plan)["zero3 int8"].parts["teacher activations"] for plan in (small, planned(teacher=widened)))
    assert by_integers > by_widening


@pytest.mark.parametrize("rows", [5, 300, 3000])
@pytest.mark.parametrize("migrated", [True, False])
def test_what_an_int8_layer_holds_on_meta_is_what_it_holds_on_a_cpu(rows: int, migrated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "CHUNK_ELEMENTS", 1 << 18)
    peaks = []
    for device in ("cpu", "meta"):
        layer = Int8Linear(torch.ones(512, 256, device=device), None, product="int_mm", migrated=migrated)
        x, watch = torch.ones(rows, 256, device=device), MemoryTracker(device)
        watch.ignore([x, *layer.parameters(), *layer.buffers()])
        with torch.no_grad(), watch:
            layer(x)
        peaks.append(watch.peak)
    filled = 32 / rows if rows < 32 else 1.0  # as on a GPU
    assert peaks[1] == pytest.approx(peaks[0] * filled, rel=0.25 if rows < 32 else 0.02)


def test_a_smaller_micro_batch_needs_less_memory_and_more_traffic_of_a_partitioned_teacher(tmp_path: Path, small: planner.Plan) -> None:
    config = tmp_path / "micro.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 64, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}))
    pieces = by_name(planner.plan(recipe(), "test", str(config), CLUSTER))
    whole = by_name(small)
    assert pieces["zero3 int8"].bytes < whole["zero3 int8"].bytes
    assert pieces["zero3 int8"].wire["teacher"] == 4 * whole["zero3 int8"].wire["teacher"]
    assert pieces["zero3 int8"].flops["student"] == pytest.approx(4 / 3 * whole["zero3 int8"].flops["student"])


def test_a_mode_fits_from_its_peak_on_and_not_below(small: planner.Plan) -> None:
    row = by_name(small)["replicated bf16"]
    needed = (row.bytes / (1 - planner.IN_PIECES) + planner.OUTSIDE) / planner.GB
    assert row.fits(replace(CLUSTER, memory=needed + 0.001).usable)
    assert not row.fits(replace(CLUSTER, memory=needed - 0.001).usable)


def test_the_recommendation_is_the_fastest_that_fits_and_says_what_to_do_where_nothing_does(small: planner.Plan) -> None:
    assert small.recommended == "replicated bf16"
    rows = by_name(small)
    between = (rows["replicated bf16"].bytes + rows["replicated int8"].bytes) / 2
    tight = replace(CLUSTER, memory=(between / (1 - planner.IN_PIECES) + planner.OUTSIDE) / planner.GB)
    name, why = planner.recommend(small.rows, tight)
    assert name == "replicated int8"
    assert "replicated bf16 would not fit" in why
    name, why = planner.recommend(small.rows, replace(CLUSTER, memory=3))
    assert name is None
    assert "train_micro_batch_size_per_gpu" in why


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ({}, "replicated bf16"),
        ({"mode": "zero3_int8", "offload": True}, "zero3 int8 + offload"),
        ({"store": "somewhere"}, "store"),
        ({"store": "somewhere", "store_of": "text", "store_miss": "fail"}, "replicated bf16, text from store"),
    ],
)
def test_the_mode_that_the_recipe_asks_for_is_found_among_the_rows(teacher: dict[str, object], name: str, small: planner.Plan) -> None:
    assert planner.asked(recipe(teacher={"model": "ViT-B-32", "pretrained": "random", **teacher}), small.rows) == name


def test_teachers_of_an_ensemble_lie_side_by_side_and_run_one_after_the_other(small: planner.Plan) -> None:
    other = {"other": {"model": "ViT-B-32", "pretrained": "random"}}
    two, one = by_name(planned(ensemble=other))["replicated bf16"], by_name(small)["replicated bf16"]
    assert two.parts["teacher weights"] == 2 * one.parts["teacher weights"]
    assert two.parts["teacher activations"] == one.parts["teacher activations"]
    assert two.flops["teacher"] == 2 * one.flops["teacher"]


def test_a_batch_ahead_takes_its_memory_beside_the_student_and_a_partitioned_teacher_waits_for_its_step(small: planner.Plan) -> None:
    """Worked by hand: 256 pairs a GPU, two models of 224 pixels and 77 tokens of 8 bytes; embeddings of 512 in bf16."""
    ahead = by_name(planned(data={"train": "none.tar", "prefetch": True}))
    batch = 2 * 256 * (3 * 224 * 224 + 77 * 8)
    for name, alone in by_name(small).items():
        grown = {place: size - alone.places[place] for place, size in ahead[name].places.items()}
        assert grown.pop("teacher") == 0
        (extra,) = set(grown.values())
        if name.startswith("zero3"):
            assert extra == batch
        elif name == "store":
            assert extra == batch + 2 * 256 * 512 * 2
        else:
            assert extra > batch + ahead[name].parts["teacher activations"] * 0.9
        assert ahead[name].parts["batch"] - alone.parts["batch"] == extra


def test_a_recipe_without_a_teacher_is_planned_too() -> None:
    plan = planned(teacher=None, objectives={"contrastive": 1.0})
    assert [row.mode.name for row in plan.rows] == ["no teacher"]
    assert plan.recommended == "no teacher"


def test_a_teacher_that_a_recipe_trains_first_is_planned_before_it_is_there() -> None:
    teacher = models.describe(Teacher(model="local-dir:nowhere/model", recipe="smoke_teacher"), "teacher")
    assert teacher.width == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"model": "ViT-bigG-41", "pretrained": "random"}}, "nearest: .*ViT-bigG-14"),
        ({"student": {"model": "ViT-B-17"}}, "nearest: .*ViT-B-16"),
        ({"optim": {"steps": 10, "batch": 4100, "lr": 1e-3}}, "does not divide over 16 ranks"),
    ],
)
def test_what_a_run_would_refuse_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**changes)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (planner.Cluster(16, 80, kind="h10"), "did you mean 'h100'"),
        (planner.Cluster(0, 80), "--gpus 0"),
        (planner.Cluster(16, -1), "--gpu_memory -1"),
    ],
)
def test_a_cluster_that_is_none_is_refused(cluster: planner.Cluster, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(cluster)


def test_traffic_of_each_zero_stage() -> None:
    """1000 bf16 parameters on 4 ranks: 2000 bytes, of which a ring sends 3/4 in a gather and 3/2 in an all-reduce."""

    def sent(stage: int, forwards: int = 1, backwards: int = 1, **more: object) -> int:
        keys = {"stage": stage, "stage3_param_persistence_threshold": 0, **more}
        return sum(wire.bytes for wire in zero.traffic((1000,), 4, zero.Settings.of({"zero_optimization": keys}, 2), forwards, backwards))

    assert [sent(stage) for stage in (0, 1, 2, 3)] == [3000, 4500, 4500, 3000]
    assert sent(1, 8, 4) == 4500  # gradients of all micro-batches are reduced once
    assert sent(2, 8, 4) == 4 * 3000 + 1500
    assert sent(3, 8, 4) == (8 + 4) * 1500
    assert sent(3, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0) == 4500  # weights gathered again in the backward
    # from the group's own copy: half of it comes from the neighbour
    assert sent(3, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0, zero_hpz_partition_size=2) == 3000 + 1000
    assert sent(3, 8, 4, stage3_param_persistence_threshold=1001) == (1 + 4) * 1500  # on every rank, and gathered once, after the update
    assert zero.traffic((1000,), 1, zero.Settings.of({}, 2), 1, 1) == (Wire(), Wire())
    sums = zero.Settings.of({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, 2)
    assert zero.traffic((1000,), 4, sums, 1, 4)[0].bytes == 2 * 3000 + 1500  # float32 gradients once, then weights in bf16


def test_traffic_of_the_losses() -> None:
    """32 pairs on 4 ranks, widths 8 and 16, bf16: a rank brings in 3/4 of all texts and sends as much."""
    shape = LossShape(32, 4, (8, 16), (2, 2), 1, False, torch.device("cpu"))
    by_blocks, whole = (ObjectiveSet(recipe(kernels={"backend": name}), shape.device, None).cost(shape) for name in ("chunked", "eager"))
    assert by_blocks.wire.all_gather == 0.75 * (32 * (8 * 2 + 16 * 2) + 5 * 4 * 32 * 4) + 3 * (24 + 8)
    assert by_blocks.wire.reduce_scatter == 0.75 * 32 * 8 * 4
    assert (by_blocks.wire.calls, whole.wire.calls) == (3 + 2 + 1, 4 + 1)
    assert whole.wire == Wire(all_gather=int(0.75 * 2 * 32 * (8 + 16) * 4) + 3 * 24, calls=5)
    assert whole.flops == 32 * 32 * (6 * 8 + 2 * 16)
    assert by_blocks.flops == 32 * 8 * (8 * 8 + 4 * 16)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0), (1.0, 2.0, 4.0)], ids=["one", "three", "three of unlike weight"])
@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize(
    "names",
    [
        *[
            ("similarity", "contrastive"),
            ("contrastive",),
            ("interactive",),
            ("cross",),
            ("feature",),
            ("masked_feature",),
            ("augmented_feature",),
            ("sigmoid_similarity",),
            ("sigmoid_contrastive",),
        ],
        *[("dist",), ("dkd",), ("standardised",), ("gradient",)],
    ],
)
def test_memory_of_the_losses_is_that_of_real_ones(backend: str, names: tuple[str, ...], weights: tuple[float, ...]) -> None:
    """N = 1536 on one rank, without any projection between the widths; to 15 %."""
    pairs, width, count = 1536, 64, len(weights)
    others = {f"further{place}": {"model": "ViT-B-32", "weight": weight} for place, weight in enumerate(weights[1:])}
    teachers_of = {"teacher": {"model": "ViT-B-32", "weight": weights[0]}, "ensemble": others}
    optim = {"steps": 1, "batch": pairs, "lr": 1.0}
    described = recipe(objectives=dict.fromkeys(names, 1.0), kernels={"backend": backend}, optim=optim, **teachers_of)
    objectives = ObjectiveSet(described, torch.device("cpu"), None)

    def towers(learns: bool) -> Embeddings:
        image, text = (torch.nn.functional.normalize(torch.randn(pairs, width), dim=-1).requires_grad_(learns) for _ in range(2))
        return Embeddings(image, text, torch.tensor(10.0).requires_grad_(learns), torch.tensor(-5.0).requires_grad_(learns))

    student, teachers = towers(True), [towers(False) for _ in range(count)]
    heads = [head_name(names[0], place) for place in range(count)]
    scales = {f"{head}.scale": student.scale for head in heads}
    student = student._replace(projected=dict.fromkeys(heads, (student.image, student.text)), features=scales)
    watch = MemoryTracker("cpu")
    watch.ignore(tensor for tower in (student, *teachers) for tensor in tower[:4])  # type: ignore[list-item]
    with watch:
        sum(objectives.losses(student, teachers).values()).backward()
    shape = LossShape(pairs, 1, (width, count * width), (4, 4), count, False, torch.device("cpu"))
    assert objectives.cost(shape).memory == pytest.approx(watch.peak, rel=0.15)


def test_heads_are_planned_with_what_they_read_and_masked_images_with_their_forward() -> None:
    """ViT-S-32 and ViT-B-32, widths 384 and 512: both fusions with their biases, and an own scale. Of 49 patches 12 are seen."""
    weights = {"contrastive": 1.0, "feature": 1.0}
    plain, fused, masked = (planned(objectives={**weights, **more}) for more in ({}, {"augmented_feature": 1.0}, {"masked_feature": 1.0}))
    assert fused.job.student.numel - plain.job.student.numel == 2 * ((384 + 512) * 384 + 384) + 1
    assert fused.job.student.flops - plain.job.student.flops == 2 * 2 * (384 + 512) * 384
    further = masked.job.student.flops - plain.job.student.flops
    assert further == vit_flops(384, 12, 13, 384) + 2 * 49 * 3 * 32 * 32 * 384 + 2 * 2 * 384 * 512


def test_the_report_names_every_mode_and_the_json_holds_every_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    report.show(planned(), file)
    shown, stored = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))
    assert [row["mode"] for row in stored["modes"]][:2] == ["replicated bf16", "replicated int8"]
    for row in stored["modes"]:
        assert row["mode"] in shown
        assert row["bytes"] == max(row["places"].values())
        assert row["fits"] is True
    assert "recommended: replicated bf16" in shown
    assert "ESTIMATES" in shown
    assert stored["assumptions"]["FORWARD_SHARE"] == rates.FORWARD_SHARE


def test_a_teacher_of_5_billion_is_planned_in_seconds_and_takes_no_memory() -> None:
    """Against the plan of a teacher of 0.15 billion just before, in the same process: what imports take and how fast the machine is
    does not count. Weights of 4.35 billion in bf16 would be 8.7 GB; 12 times as many operators are counted.
    """
    program = (
        "import sys, time; from megakd.planning import plan as planner; from megakd.recipe import load\n"
        "from megakd.runtime.stopwatch import resident_gb\n"
        "def planned(model):\n"
        "    teacher = f\"teacher={{ model = '{model}', pretrained = 'random' }}\"\n"
        "    recipe, name = load.load('smoke', [teacher, *sys.argv[1:]])\n"
        "    peak_gb, seconds = resident_gb('VmHWM'), time.process_time()\n"
        f"    plan = planner.plan(recipe, name, {ZERO1!r}, planner.Cluster(16, 80))\n"
        "    return plan, resident_gb('VmHWM') - peak_gb, time.process_time() - seconds\n"
        "_, _, usual = planned('ViT-B-32')\n"
        "plan, grown_gb, seconds = planned('EVA02-E-14-plus')\n"
        "print(plan.job.teachers[0].image.wide.numel, plan.rows[0].parts['teacher weights'], grown_gb, seconds / usual)"
    )
    sets = ["student={ model = 'ViT-B-16' }", "optim.batch=8192"]
    done = subprocess.run([sys.executable, "-c", program, *sets], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numel, weights, grown_gb, times = map(float, done.stdout.split()[-4:])
    assert numel == pytest.approx(4.351e9, rel=1e-3)
    assert weights == pytest.approx(2 * 5.045e9, rel=0.02)
    assert grown_gb < 0.02 * weights / 1e9
    assert times < 12
