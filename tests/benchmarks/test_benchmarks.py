"""The benchmarks' own arithmetic, parsers and child processes, our side end to end on tiny models, and, slow, the real comparison."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import psutil
import pytest
import torch
from open_clip.loss import DistillClipLoss
from PIL import Image
from torch.nn import functional as F

from megakd.benchmarks import loader, loader_side, objectives, step_rows, teacher_speed
from megakd.benchmarks import step as benchmark
from megakd.benchmarks.common import comparison, environment, material, side_by_side, teacher_quality
from megakd.benchmarks.common.children import environ, running
from megakd.benchmarks.common.comparison import THEIRS, Comparison, Round
from megakd.benchmarks.common.logs import Step, open_clip_steps, our_steps, share_beside_towers
from megakd.benchmarks.common.material import Shards
from megakd.benchmarks.common.side_by_side import Timed
from megakd.models.embeddings import Embeddings
from megakd.models.int8 import matmul
from megakd.models.int8.agreement import Agreement
from megakd.models.patches import Patches
from megakd.objectives.set import ObjectiveSet
from megakd.recipe import Objectives, Recipe
from megakd.recipe.load import load
from megakd_kernels import panels, two_pass_torch

# Two lines of open_clip 3.3.0, joined from pieces: as in the file, each is one line.
OPEN_CLIP_LOG = (
    "2031-02-03,04:05:06 | INFO | Start epoch 0\n"
    "2031-02-03,04:05:19 | INFO | Train Epoch: 0 [     32/3200000 (0%)] Data (t): 1.402 Batch (t): 13.412, 2.38592/s, 2.38592/s/gpu "
    "LR: 0.000000 Logit Scale: 14.286 Contrastive_loss: 3.5019 (3.5019) Distill_loss: 3.4657 (3.4657) Loss: 6.9676 (6.9676)\n"
    "2031-02-03,04:05:31 | INFO | Train Epoch: 0 [3200000/3200000 (100%)] Data (t): 0.003 Batch (t): 0.025, 1280.00/s, 1280.00/s/gpu "
    "LR: 0.000000 Logit Scale: 14.286 Contrastive_loss: 3.4019 (3.4519) Distill_loss: 3.4657 (3.4657) Loss: 6.8676 (6.9176)\n"
)

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}


def test_open_clips_log_lines_are_read() -> None:
    first, second = open_clip_steps(OPEN_CLIP_LOG)
    assert first == Step(2.38592, {"data": 1.402, "step": 13.412})
    assert second.images_per_second == 1280.0
    assert open_clip_steps("Start epoch 0\nTrain Epoch: 0 [ 32/64 (50%)] Data (t): 1.4") == []  # a line that is still being written


def test_open_clips_program_still_writes_such_lines() -> None:
    """The format is the installed version's: its own f-string, found in its source."""
    source = (Path(open_clip.__file__).parents[1] / "open_clip_train" / "train.py").read_text(encoding="utf-8")
    assert 'f"Train Epoch: {epoch} [{num_samples:>{sample_digits}}/{samples_per_epoch} ({percent_complete:.0f}%)] "' in source
    assert 'f"Batch (t): {batch_time_m.avg:.3f}, {samples_per_second:#g}/s, {samples_per_second_per_gpu:#g}/s/gpu "' in source


def test_metrics_rows_are_read_without_events_and_half_lines(tmp_path: Path) -> None:
    assert our_steps(tmp_path) == []
    row = {"step": 1, "images_per_second": 4.0, "seconds": {"data": 1.0, "teacher": 3.0, "student": 3.5, "other": 0.5}}
    lines = [json.dumps(row), json.dumps({"step": 1, "event": "evaluation", "content": {}}), json.dumps(row)[:20]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (step,) = our_steps(tmp_path)
    assert step.images_per_second == 4.0
    assert share_beside_towers([step]) == pytest.approx(1.5 / 8)


def test_medians_and_ratios() -> None:
    result = Comparison([Round([1.0, 2.0, 9.0], [4.0]), Round([6.0], [2.0, 4.0]), Round([3.0], [1.0])])
    assert result.ours == 3.0  # of 2, 6, 3
    assert result.theirs == 3.0  # of 4, 3, 1
    assert result.ratio == 1.0
    assert result.paired == 2.0  # of .5, 2, 3
    assert result.best == 9 / 4


def test_rounds_alternate_who_goes_first(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def side(name: str, rate: float) -> list[float]:
        order.append(name)
        return [rate]

    result = comparison.alternate(3, lambda number: side(f"ours {number}", 2.0), lambda number: side(f"theirs {number}", 1.0))
    assert order == ["ours 0", "theirs 0", "theirs 1", "ours 1", "ours 2", "theirs 2"]
    assert result.ratio == 2.0
    assert "round 3/3" in capsys.readouterr().out


def test_report_is_a_table_and_one_line_of_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = Comparison([Round([2.0], [1.0])])
    where = comparison.conditions({"torch": "1"}, threads=1)
    comparison.report("bench x", "images/s", result, {"batch": 2}, where, ["a [note]"], {"more": 1}, tmp_path / "result.json")
    out = capsys.readouterr().out
    row = json.loads(out.splitlines()[-1])
    assert row == json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert (row["ratio"], row["settings"], row["more"]) == (2.0, {"batch": 2}, 1)
    assert {"versions", "processor", "cores", "command", "commit"} <= set(row)
    assert "- a [note]" in out


def test_both_programs_minimise_the_same_loss() -> None:
    """The work is equal: contrastive + similarity KD here, DistillClipLoss there, have the same gradients."""
    torch.manual_seed(0)
    image, text, teacher_image, teacher_text = (F.normalize(torch.randn(8, width)) for width in (6, 6, 10, 10))
    scales = torch.tensor(14.0), torch.tensor(50.0)
    recipe, _ = load("smoke")
    objectives = recipe.objectives.model_copy(update={"contrastive": 1.0, "similarity": 1.0})
    task = ObjectiveSet(recipe.model_copy(update={"objectives": objectives}), torch.device("cpu"), None)
    gradients = []
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scales[0])]
        if ours:
            losses = task.losses(Embeddings(*leaves, None, {}), [Embeddings(teacher_image, teacher_text, scales[1], None, {})])
        else:
            losses = DistillClipLoss()(*leaves, teacher_image, teacher_text, scales[1], output_dict=True)
        gradients.append(torch.autograd.grad(sum(losses.values()), leaves))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_our_recipe_is_a_valid_one(tmp_path: Path) -> None:
    job = benchmark.StepBenchmark(Shards(tmp_path, 64), {"architecture": TINY, "pretrained": "random"}, {"architecture": TINY}, 8, 2, 1, 1)
    recipe, _ = load(str(side_by_side.write_recipe(job.recipe(), tmp_path / "recipe.json")))
    assert isinstance(recipe, Recipe)
    assert recipe.student.architecture == TINY
    assert recipe.active() == {"contrastive": 1.0, "similarity": 1.0}
    assert (recipe.log.every, recipe.views.crop_scale, recipe.views.flip) == (1, (0.9, 1.0), 0.0)


def test_our_augmentation_is_open_clips_default() -> None:
    assert open_clip.AugmentationCfg().scale == (0.9, 1.0)


def test_open_clips_command_has_flags_that_it_knows(tmp_path: Path) -> None:
    job = benchmark.StepBenchmark(Shards(tmp_path, 64), {"model": "ViT-B-32", "pretrained": "w.pt"}, {"model": "ViT-S-32"}, 8, 2, 1, 1)
    command = benchmark.open_clip_command(job, Path("python"), tmp_path)
    from open_clip_train.params import parse_args

    args = parse_args(command[4:])
    assert (args.distill_model, args.distill_pretrained, args.model) == ("ViT-B-32", "w.pt", "ViT-S-32")
    assert (args.log_every_n_steps, args.precision, args.grad_clip_norm, args.workers) == (1, "fp32", 1.0, 1)


def _timed(processor_seconds: float, rate: float) -> Timed:
    return Timed([Step(rate, {})], processor_seconds)


def test_a_row_is_judged_by_its_least_round_or_by_its_median() -> None:
    sides = {
        "float32": [_timed(10.0, 2.0), _timed(8.0, 2.0), _timed(5.0, 2.0)],
        "int8": [_timed(4.0, 4.0), _timed(8.0, 4.0), _timed(5.0, 4.0)],
        THEIRS: [_timed(10.4, 1.0), _timed(12.0, 1.0), _timed(10.0, 4.0)],
    }
    each = step_rows.outcome(step_rows.ROWS["float32"], sides, None)
    assert each.processor == pytest.approx([1.04, 1.5, 2.0])
    assert each.wall == [2.0, 2.0, 0.5]
    assert not each.reached
    assert each.verdict == "missed: least round 1.040, asked for 1.05"
    agreeing = Agreement(32, cosine=0.9995, worst_cosine=0.9, centred=0.9, top1=1.0, divergence=0.0)
    assert step_rows.outcome(step_rows.ROWS["int8"], sides, agreeing).verdict.startswith("reached: median 2.000, asked for 1.50")
    for worse in (replace(agreeing, top1=0.98), replace(agreeing, cosine=0.9989), replace(agreeing, cosine=math.nan)):
        fast = step_rows.outcome(step_rows.ROWS["int8"], sides, worse)
        assert not fast.reached  # however fast
        assert "does not agree" in fast.verdict


def test_rows_are_chosen_by_name() -> None:
    assert [row.name for row in step_rows.chosen(["store", "float32"])] == ["float32", "store"]
    assert len(step_rows.chosen([])) == len(step_rows.ROWS)
    with pytest.raises(ValueError, match="--rows int4: one of float32, int8, store, compiled"):
        step_rows.chosen(["int4"])


def test_each_of_our_sides_has_a_valid_recipe(tmp_path: Path) -> None:
    teacher = {"architecture": TINY, "pretrained": "random"}
    job = benchmark.StepBenchmark(Shards(tmp_path, 64), teacher, {"architecture": TINY}, 8, 2, 1, 1)
    sides = {name: Recipe.model_validate(content) for name, content in job.recipes(tmp_path / "store").items()}
    assert {row.side for row in step_rows.ROWS.values()} == sides.keys()
    assert {name: (side.teacher.mode, side.teacher.store) for name, side in sides.items() if side.teacher} == {
        "float32": ("replicated", None), "int8": ("replicated_int8", None), "store": ("replicated", str(tmp_path / "store")),
        "compiled": ("replicated", None),
    }  # fmt: skip
    compiled = {name for name, side in sides.items() if side.student and side.student.compile and side.teacher and side.teacher.compile}
    assert compiled == {"compiled"}
    assert all(side.student and side.student.text_padding == "longest" for side in sides.values())


def test_an_8_bit_teacher_is_compared_on_the_first_batch(world: Path) -> None:
    teacher = {"architecture": TINY, "pretrained": "random", "mode": "replicated_int8", "int8_product": "dequantise"}
    content = side_by_side.recipe("quality", str(world / "train" / "*.tar"), {"architecture": TINY}, teacher, 8, 1)
    told, product = teacher_quality.on_first_batch(content)
    assert (told.pairs, product) == (8, "dequantise")
    assert 0.999 < told.worst_cosine < told.cosine < 1  # weights alone are rounded, and they are


def test_our_side_is_timed_end_to_end(world: Path, tmp_path: Path) -> None:
    """The training program itself, with workers; it is killed after the timed steps, and so are they."""
    teacher, student = {"architecture": TINY, "pretrained": "random"}, {"architecture": TINY}
    job = benchmark.StepBenchmark(Shards(world / "train", 600), teacher, student, 8, 3, 1, 1)
    timed = benchmark.measure_ours(job, tmp_path / "ours")
    steps = timed.steps
    assert len(steps) == 3
    assert all(step.images_per_second > 0 for step in steps)
    assert 0 < share_beside_towers(steps) < 1
    assert timed.processor_seconds >= 0
    assert not _running(str(tmp_path), patience=60)


def test_our_loader_is_timed_for_one_and_two_towers(world: Path) -> None:
    for sizes in ([32], [32, 48]):
        found = loader_side.ours(str(world / "train" / "*.tar"), batch=8, workers=1, warm_up=1, batches=40, sizes=sizes, data={})
        assert found["samples_per_second"] > 0
        assert found["processor_ms"] > 0


def test_processor_time_counts_the_workers() -> None:
    worker = multiprocessing.get_context("fork").Process(target=_spin)
    worker.start()
    before, end = time.process_time(), time.monotonic() + 240
    while loader_side.processor_seconds() - before <= 0.05:  # on a busy machine its turn comes late
        assert time.monotonic() < end, "the worker's time is not counted"
        time.sleep(0.05)
    worker.kill()
    worker.join()


def _spin() -> None:
    while True:
        pass


def test_answer_waits_for_the_whole_line() -> None:
    assert loader.answer('a warning\n{"samples_per_second": 12') is None
    assert loader.answer('a warning\n{"samples_per_second": 12.5}\n') == {"samples_per_second": 12.5}


def test_a_program_that_ends_early_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    with (
        running(["sh", "-c", "echo out of luck; exit 3"], tmp_path, "child", 1) as child,
        pytest.raises(ValueError, match=r"code 3(.|\n)*out of luck"),
    ):
        child.wait_for(lambda: None, 20)


def test_sigterm_ends_the_children_with_their_workers(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from megakd.benchmarks.common.children import ended_by_sigterm, running\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "with ended_by_sigterm(), running(['sh', '-c', 'sleep 61.25 & setsid sleep 61.75 & echo up; wait'], folder, 'child', 1) as child:\n"
        "    child.wait_for(lambda: child.text() or None, 120); print('up', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environ(1)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert _running("sleep 61.25")
        assert _running("sleep 61.75", patience=60)  # in a session of its own, as torchrun's ranks are
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
    assert not _running("sleep 61.25", patience=60)
    assert not _running("sleep 61.75", patience=60)


def _running(words: str, patience: float = 0.0) -> bool:
    """Whether a process has these words in its command line, still after `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        found = [process.info["cmdline"] for process in psutil.process_iter(["cmdline", "status"]) if process.info["status"] != "zombie"]
        # the test's own helper has the words in its program
        if not any(words in " ".join(line) and "ended_by_sigterm" not in " ".join(line) for line in found if line):
            return False
        if time.monotonic() >= end:
            return True
        time.sleep(0.1)


def test_children_do_not_inherit_a_launchers_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "4")
    assert not {"RANK", "WORLD_SIZE", "SLURM_NTASKS"} & set(environ(2))
    assert environ(2)["OMP_NUM_THREADS"] == "2"


def test_without_a_network_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {environment.VARIABLE: str(tmp_path / "env"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):  # what a first attempt leaves does not stop a second
        with pytest.raises(ValueError, match=environment.VARIABLE) as error:
            environment.set_up()
        assert "No matching distribution" in str(error.value)


def test_an_environment_of_the_users_own_is_never_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data", encoding="utf-8")
    monkeypatch.setenv(environment.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match=r"open_clip_torch\[training\]"):
        environment.set_up()
    assert (tmp_path / "precious").exists()


def test_pictures_weigh_what_photographs_do() -> None:
    pictures = [material.photograph(np.random.default_rng(seed)) for seed in range(8)]
    assert 10_000 < np.mean([len(picture) for picture in pictures]) < 40_000
    assert min(Image.open(io.BytesIO(pictures[0])).size) == material.SHORT_SIDE


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_real_comparisons_run(capsys: pytest.CaptureFixture[str]) -> None:
    if environment.ready() is None:
        pytest.skip(f"no environment for open_clip in {environment.place()}: `megakd bench loader` sets it up, with a network")
    benchmark.run(1, 2, 2, rows=["float32", "int8"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows.keys() == {"float32", "int8"}
    assert all(ratio > 0 for row in rows.values() for ratio in (*row["processor"], *row["wall"]))
    assert rows["int8"]["quality"]["pairs"] == 2
    loader.run(1, 1, batch=16, batches=2, sources="set,1024")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    ways = [("set", "default"), ("set", "torch"), *(("1024", way) for way in loader.WAYS)]
    assert [(row["source"], row["way"]) for row in found] == ways
    assert all(row["ratio"] > 0 and row["processor_ratio"] > 0 for row in found)


def test_int8_speed_compares_every_way_to_multiply_on_one_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    rows = teacher_speed.run("ViT-S-32-alt", 2, 1, file)
    assert [row["weights"] for row in rows] == ["float32", "int8, dequantise", "int8, bitsandbytes", "int8, int_mm", "int8, onednn"]
    assert json.loads(file.read_text())["rows"] == rows
    assert all(row["worst_cosine"] > 0.999 for row in rows)
    assert all(row["memory_ratio"] < 0.4 for row in rows[1:])
    assert "images/s" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--model ViT-bigH: open_clip has no such model"):
        teacher_speed.run("ViT-bigH", 2, 1)


def test_int8_with_outliers_is_measured_with_its_remedies(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["weights"]: row["centred_cosine"] for row in teacher_speed.run("ViT-S-32-alt", 8, 1, outliers=True)}
    assert rows["float32"] == pytest.approx(1.0)
    for product in ("int_mm", "bitsandbytes"):
        lost = 1 - rows[f"int8, {product}"]
        assert lost > 0.02
        assert 1 - rows[f"int8, {product}, threshold 6"] < lost / 3
        assert 1 - rows[f"int8, {product}, calibrated"] < lost / 20
    assert "weights random with outliers" in capsys.readouterr().out


@pytest.mark.gpu
def test_bigg_in_int8_is_faster_and_half_as_large_on_a_gpu() -> None:
    rows = {row["weights"]: row for row in teacher_speed.measure("ViT-bigG-14", 64, 9, torch.device("cuda"))}
    chosen = rows[f"int8, {matmul.choose(torch.device('cuda'))}"]
    assert chosen["speed_ratio"] >= 1.3
    assert chosen["memory_ratio"] <= 0.55
    assert chosen["worst_cosine"] >= 0.999


def test_every_objective_is_timed_by_each_way_to_compute_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = objectives.run([48], 1, ["contrastive + similarity", "dist", "patch"], tmp_path / "found.json")
    found = [(row.objective, row.backend) for row in rows]
    assert found[0] == (objectives.OPEN_CLIP, "eager")
    both, dist = ([(name, backend) for backend in ("eager", "chunked")] for name in (objectives.BOTH, "dist"))
    assert found[1:] == [*both, ("patch", "torch"), *dist]
    assert all(len(row.seconds) == 1 and row.bytes > 0 for row in rows)
    assert "48 pairs" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["rows"]) == len(rows)
    with pytest.raises(ValueError, match="--only simmilarity: no objective is called so; there are contrastive"):
        objectives.run([48], 1, ["simmilarity"])


def test_no_objective_stores_the_matrix_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """At widths that are small beside it, in panels of a sixty-fourth of it."""
    pairs, narrow = 512, {-2: Patches(1, 16, (1, 1))}
    monkeypatch.setitem(panels.PANEL_BYTES, "cpu", 4 * pairs**2 // 64)
    for name, value in {"LEAST_KEPT": 0, "CPU_ROWS": 64, "CPU_COLUMNS": 64}.items():
        monkeypatch.setattr(two_pass_torch, name, value)
    monkeypatch.setattr(objectives, "WIDTHS", (16, 24))
    monkeypatch.setattr(objectives, "BLOCKS", (narrow, narrow))
    rows = objectives.measure(pairs, 1, [name for name in Objectives.model_fields if name != "rkd"], torch.device("cpu"))
    most = {row.objective: row.bytes / (4 * pairs**2) for row in rows if row.backend != "eager"}
    assert most.keys() == {name for name in Objectives.model_fields if name != "rkd"}
    assert max(most.values()) < 1, most
