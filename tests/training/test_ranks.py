"""One rank, two ranks, micro-batches, ZeRO stages, recomputed activations: the same training, seen in the run folders.

The two ranks start as srun starts them; other tests use torchrun and deepspeed. Gradients are read from
AdamW's first moment after the first step, which is (1 - beta1) times the gradient.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.runtime import checkpoint
from support import PROGRAMS
from support.forked import fork
from support.runs import (
    ENSEMBLE,
    EVERY_OBJECTIVE,
    GRADIENT,
    KD,
    TINY_LLAMA,
    answering,
    curve,
    ds_config,
    environment,
    losses,
    rows,
    settings,
    train,
)

STEPS, BETA1 = 4, 0.9
WEIGHTED = (
    *ENSEMBLE,
    "ensemble.second.weight=3",
    "teacher.scale=30",
    "ensemble.second.scale=matched",
    "similarity.teacher_temperature=0.5",
)
KEPT = ("checkpoint.every=1", "checkpoint.keep=9", f"optim.steps={STEPS}", "optim.clip=0.0", "optim.warmup=0")


class Runs:
    """Run folders by name, with the outcomes of the jobs on two ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: dict[str, list[dict[str, Any]]] = {}

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def runs(recipe_file: Path, evaluations: tuple[str, ...], world: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    found = Runs(folder)
    kd = (*KD, *KEPT, *evaluations)
    micro = ds_config(folder / "micro.json", train_micro_batch_size_per_gpu=4)
    stages = [ds_config(folder / f"stage{stage}.json", zero_optimization={"stage": stage}) for stage in (1, 2, 3)]
    micro_stages = [
        ds_config(folder / f"micro{stage}.json", zero_optimization={"stage": stage}, train_micro_batch_size_per_gpu=4) for stage in (2, 3)
    ]

    def arguments(name: str, sets: tuple[str, ...], *more: str | Path) -> list[str]:
        return ["--recipe", str(recipe_file), "--out", str(folder / name), *map(str, more), *settings(*sets)]

    def alone(name: str, sets: tuple[str, ...], *more: str | Path) -> None:
        finished = train(None, *arguments(name, sets, *more))
        assert finished.code == 0, finished.err + finished.out

    alone("one", kd)
    alone("one_again", kd)
    alone("one_micro", kd, "--ds_config", micro)
    alone("one_micro_stage3", kd, "--ds_config", micro_stages[1])
    alone("one_recomputed", (*kd, "student.activation_checkpointing=true"))
    alone("one_mlp", (*kd, "feature.head=mlp"))
    every = (*EVERY_OBJECTIVE, *KEPT)
    alone("one_every", (*every, "kernels.backend=eager"))
    alone("one_every_int8", (*every, "teacher.mode=replicated_int8"))
    alone("one_gradient", (*GRADIENT, *KEPT))
    alone("one_int8", (*kd, "teacher.mode=replicated_int8"))
    alone("one_ensemble", (*kd, *ENSEMBLE))
    alone("one_weighted", (*kd, *WEIGHTED, "kernels.backend=chunked"))
    decoder = (f"decoder.architecture={TINY_LLAMA}", f"decoder.tokenizer={world}/tokenizer")
    alongside = (*KD, *KEPT, *decoder, *answering(world), "decoder.lora.dropout=0.0", "answers.tower=trained")
    alone("one_alongside", alongside)
    alone("one_answers", (*alongside, "objectives={}", "answers.lr.projector=3e-4"))
    _half(found["one"], found["two_from_one"])
    jobs = {
        "two": arguments("two", kd),
        **{f"two_stage{stage}": arguments(f"two_stage{stage}", kd, "--ds_config", path) for stage, path in enumerate(stages, 1)},
        **{
            f"two_micro_stage{stage}": arguments(f"two_micro_stage{stage}", kd, "--ds_config", path)
            for stage, path in zip((2, 3), micro_stages, strict=True)
        },
        "two_mlp_recomputed": arguments("two_mlp_recomputed", (*kd, "feature.head=mlp", "student.activation_checkpointing=true")),
        "two_alongside_stage2": arguments("two_alongside_stage2", alongside, "--ds_config", micro_stages[0]),
        **{
            f"two_answers_stage{stage}": arguments(
                f"two_answers_stage{stage}", (*alongside, "objectives={}", "answers.lr.projector=3e-4"), "--ds_config", stages[stage - 1]
            )
            for stage in (2, 3)
        },
        "two_zero3": arguments("two_zero3", (*kd, "teacher.mode=zero3"), "--ds_config", stages[2]),
        "two_zero3_int8": arguments("two_zero3_int8", (*kd, "teacher.mode=zero3_int8"), "--ds_config", micro_stages[0]),
        "two_ensemble": arguments("two_ensemble", (*kd, *ENSEMBLE, "ensemble.second.mode=zero3")),
        "two_weighted": arguments("two_weighted", (*kd, *WEIGHTED), "--ds_config", micro_stages[0]),
        "two_every_chunked": arguments("two_every_chunked", (*every, "kernels.backend=chunked")),
        **{
            f"two_every_zero{stage}": arguments(
                f"two_every_zero{stage}", (*every, "teacher.mode=zero3_int8"), "--ds_config", stages[stage - 1]
            )
            for stage in (2, 3)
        },
        "two_every_ring": arguments("two_every_ring", (*every, "kernels.ring=true"), "--ds_config", micro_stages[0]),
        "two_gradient": arguments("two_gradient", (*GRADIENT, *KEPT, "kernels.backend=chunked"), "--ds_config", micro_stages[0]),
        "two_from_one": arguments("two_from_one", kd),
        "poisoned": arguments("poisoned", ("checkpoint.every=2", "optim.steps=6")),
        "odd_batch": arguments("odd_batch", ("optim.batch=15",)),
        "missing_shard": arguments("missing_shard", (f"data.train={world}/nothing/*.tar",)),
        "missing_checkpoint": arguments("missing_checkpoint", (), "--resume", "nowhere"),
        "no_checkpoint": arguments("no_checkpoint", (), "--resume", folder),
    }
    content = [{"arguments": command, "poison": 4 if name == "poisoned" else None} for name, command in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(content), encoding="utf-8")
    outcomes = _as_srun(folder, [str(PROGRAMS / "train_jobs.py"), "jobs.json", "outcomes"])
    found.outcomes = {name: list(pair) for name, *pair in zip(jobs, *outcomes, strict=True)}
    _half(found["two"], found["one_from_two"])
    alone("one_from_two", kd)
    return found


def _half(whole: Path, half: Path) -> None:
    """The run as it was in the middle."""
    shutil.copytree(whole, half)
    for path in checkpoint.available(half)[STEPS // 2 :]:
        shutil.rmtree(path)


def _as_srun(folder: Path, command: list[str]) -> list[list[dict[str, Any]]]:
    shared = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid())}
    ranks = [fork(command, environment(SLURM_PROCID=rank, SLURM_LOCALID=rank, **shared), folder) for rank in ("0", "1")]
    try:
        printed = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(text[-4000:] for text in printed)
    return [json.loads((folder / f"outcomes.{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def _gradients(run: Path) -> dict[str, torch.Tensor]:
    _, state = checkpoint.load(checkpoint.available(run)[0])
    return {name.removeprefix("exp_avg/"): value / (1 - BETA1) for name, value in state.moments.items() if name.startswith("exp_avg/")}


def _assert_same_training(run: Path, reference: Path) -> None:
    """Losses of all steps within 1e-5, gradients of the first step and the last weights within 1e-5 of their tensor's largest entry."""
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    for row, expected in zip(rows(run), rows(reference), strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
        assert row.get("scale", 0.0) == pytest.approx(expected.get("scale", 0.0), rel=1e-6)
        assert row.get("teacher_scale", {}) == pytest.approx(expected.get("teacher_scale", {}), rel=1e-5)
    mine, theirs = _gradients(run), _gradients(reference)
    assert mine.keys() == theirs.keys()
    largest = max(value.abs().max() for value in theirs.values())
    for name, value in theirs.items():
        bound = 1e-5 * max(float(value.abs().max()), 1e-3 * float(largest))
        assert float((mine[name] - value).abs().max()) < bound, name
    for name, value in checkpoint.load_weights(checkpoint.available(reference)[-1])[1].items():
        found = checkpoint.load_weights(checkpoint.available(run)[-1])[1][name]
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_same_command_gives_the_same_bits(runs: Runs) -> None:
    assert curve(runs["one_again"]) == curve(runs["one"])


def test_all_three_losses_are_logged_and_fall_under_one_total(runs: Runs) -> None:
    for row in rows(runs["one"]):
        assert row["losses"].keys() == {"contrastive", "similarity", "feature"}
        parts = row["losses"]
        assert row["loss"] == pytest.approx(parts["contrastive"] + 2 * parts["similarity"] + 0.5 * parts["feature"])


@pytest.mark.parametrize("name", ["two", "two_stage1", "two_stage2", "two_stage3"])
def test_two_ranks_train_as_one_does(runs: Runs, name: str) -> None:
    assert [outcome.get("code") for outcome in runs.outcomes[name]] == [0, 0], runs.outcomes[name]
    _assert_same_training(runs[name], runs["one"])


@pytest.mark.parametrize("name", ["one_micro", "one_micro_stage3", "two_micro_stage2", "two_micro_stage3"])
def test_accumulation_over_micro_batches_is_exact(runs: Runs, name: str) -> None:
    assert json.loads((runs[name] / "run.json").read_text())["ds_config"]["train_micro_batch_size_per_gpu"] == 4
    _assert_same_training(runs[name], runs["one"])


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("two_zero3", "one"),
        ("two_zero3_int8", "one_int8"),
        ("two_ensemble", "one_ensemble"),
        ("two_weighted", "one_weighted"),
        ("two_every_zero2", "one_every_int8"),
        ("two_every_zero3", "one_every_int8"),
    ],
)
def test_a_partitioned_teacher_beside_any_student_teaches_as_a_replicated_one(runs: Runs, name: str, reference: str) -> None:
    assert [outcome.get("code") for outcome in runs.outcomes[name]] == [0, 0], runs.outcomes[name]
    _assert_same_training(runs[name], runs[reference])


@pytest.mark.parametrize(
    ("name", "reference"),
    [("two_alongside_stage2", "one_alongside"), ("two_answers_stage2", "one_answers"), ("two_answers_stage3", "one_answers")],
)
def test_answers_train_on_two_partitioned_ranks_as_on_one(runs: Runs, name: str, reference: str) -> None:
    assert [outcome.get("code") for outcome in runs.outcomes[name]] == [0, 0], runs.outcomes[name]
    _assert_same_training(runs[name], runs[reference])
    assert (runs[name] / "bundle" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_second_teacher_and_eight_bits_change_what_is_learned(runs: Runs) -> None:
    """Or the tests above would compare runs without them."""
    assert losses(runs["one_ensemble"]) != losses(runs["one"]) != losses(runs["one_int8"])
    assert losses(runs["one_weighted"]) != losses(runs["one_ensemble"])
    assert losses(runs["one_int8"]) == pytest.approx(losses(runs["one"]), rel=0.01)


@pytest.mark.parametrize(("name", "backend"), [("one_every", "eager"), ("two_every_chunked", "chunked"), ("two_every_ring", "chunked")])
def test_every_objective_trains_the_same_whatever_computes_it_and_the_metrics_say_what_did(runs: Runs, name: str, backend: str) -> None:
    """All but what draws: masks, as dropout, are others on other ranks."""
    _assert_same_training(runs[name], runs["one_every"])
    named = {setting.split("=")[0].removeprefix("objectives.") for setting in EVERY_OBJECTIVE if setting.startswith("objectives.")}
    for row in rows(runs[name]):
        assert row["losses"].keys() == named | {"contrastive"}
        without_a_kernel = {"feature", "patch", "patch_relation", "attention", "rkd"}
        assert row["backends"] == dict.fromkeys(row["losses"].keys() - without_a_kernel, backend)


def test_gradient_distillation_trains_the_same_on_two_ranks_in_micro_batches(runs: Runs) -> None:
    _assert_same_training(runs["two_gradient"], runs["one_gradient"])
    assert all(row["losses"]["gradient"] > 0 for row in rows(runs["one_gradient"]))


def test_recomputing_activations_changes_nothing(runs: Runs) -> None:
    _assert_same_training(runs["one_recomputed"], runs["one"])
    _assert_same_training(runs["two_mlp_recomputed"], runs["one_mlp"])


def test_a_run_of_one_rank_goes_on_with_two(runs: Runs) -> None:
    assert losses(runs["two_from_one"])[: STEPS // 2] == losses(runs["one"])[: STEPS // 2]
    _assert_same_training(runs["two_from_one"], runs["one"])


def test_a_run_of_two_ranks_goes_on_with_one(runs: Runs) -> None:
    _assert_same_training(runs["one_from_two"], runs["two"])


def test_two_ranks_evaluate_as_one_does(runs: Runs) -> None:
    one, two = (json.loads((runs[name] / "evaluation.json").read_text()) for name in ("one", "two"))
    assert set(one["hard_negatives"]["test"]) == set(two["hard_negatives"]["test"])
    for found in (one, two):
        found.pop("images_per_second")
    assert two["retrieval"]["test"]["pairs"] == one["retrieval"]["test"]["pairs"] == 60
    # One of 60 pairs or 70 images may change places on a rounding of the weights.
    _assert_near(two, one, 1 / 30)


def _assert_near(found: Any, expected: Any, tolerance: float) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_near(found[key], expected[key], tolerance)
    else:
        assert found == pytest.approx(expected, abs=tolerance)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_leaves_the_last_good_checkpoint(runs: Runs) -> None:
    for outcome in runs.outcomes["poisoned"]:
        assert outcome["error"] == "LossNotFinite"
        assert "step 5" in outcome["message"]
    path = checkpoint.latest_valid(runs["poisoned"], print)
    assert path is not None
    progress, state = checkpoint.load(path)
    assert progress.step == 4
    assert all(bool(value.isfinite().all()) for value in (*state.weights.values(), *state.moments.values()))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odd_batch", ["optim.batch = 15", "does not divide over 2 ranks", "14 or 16"]),
        ("missing_shard", ["nothing"]),
        ("missing_checkpoint", ["--resume nowhere"]),
        ("no_checkpoint", ["no checkpoint there"]),
    ],
)
def test_a_users_mistake_ends_both_ranks_with_the_same_message(runs: Runs, name: str, words: list[str]) -> None:
    first, second = runs.outcomes[name]
    assert first == second
    assert all(word in first["message"] for word in words), first


def test_other_ranks_than_the_main_one_print_nothing(runs: Runs) -> None:
    """What people see is written once: one run.json and one row a step, whatever the number of ranks."""
    assert [row["step"] for row in rows(runs["two"])] == list(range(1, STEPS + 1))
    assert json.loads((runs["two"] / "run.json").read_text())["ranks"] == 2
