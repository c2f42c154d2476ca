"""The paths that users run, on a CUDA device: `make gpu` runs these where one is. Each is a program of its own, as theirs is.

On a CPU the same branches are rehearsed in bf16 by the other tests; here NCCL, streams, fused AdamW, Triton and int8 products are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import python_path
from support.runs import (
    ENSEMBLE,
    KD,
    LAUNCHER_VARIABLES,
    REPOSITORY,
    answering,
    ds_config,
    events,
    question_source,
    rows,
    settings,
    zero,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(170)]
# bitsandbytes wants inputs in blocks of 64.
LANGUAGE = "{ model_type = 'llama', hidden_size = 64, num_hidden_layers = 2, num_attention_heads = 2, intermediate_size = 128 }"
LIMIT = 150.0  # seconds; `make gpu` has two minutes for all of these, side by side


def _run(*command: str | Path) -> str:
    """A Python program on the GPU to its end; its output."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment = {**kept, "DS_ACCELERATOR": "cuda", "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _train(recipe: Path | str, out: Path, *sets: str, ds: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a run's log, all finite: a run stops at a loss that is not."""
    config = [] if ds is None else ["--ds_config", ds]
    output = _run("megakd/train.py", "--recipe", recipe, "--out", out, *config, *settings(*sets))
    assert "done: " in output
    return rows(out)


def test_the_smoke_teacher_learns_in_bf16_and_teaches_the_smoke_student(world: Path, tmp_path: Path) -> None:
    short = ("optim.steps=40", "optim.warmup=5", "optim.batch=128", "log.every=1", "data.workers=2")
    ours = (
        f"data.train={world}/train/*.tar",
        f"student.tokenizer={world}/tokenizer",
        f"evaluation.zero_shot={{ seen = '{world}/zeroshot' }}",
    )
    sets = (*short, *ours, f"evaluation.retrieval.test={world}/test/*.tar", f"evaluation.hard_negatives.test={world}/test/*.tar")
    teacher = tmp_path / "teacher"
    alone = _train("smoke_teacher", teacher, *sets)
    taught = _train("smoke", tmp_path / "student", *sets, f"teacher.model=local-dir:{teacher}/model")
    for found in (alone, taught):
        assert found[-1]["loss"] < 0.9 * found[0]["loss"]
    assert json.loads((teacher / "run.json").read_text(encoding="utf-8"))["ds_config"]["bf16"]["enabled"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_distillation_runs_at_every_stage_with_exact_accumulation(
    recipe_file: Path, evaluations: tuple[str, ...], tmp_path: Path, stage: int
) -> None:
    config = ds_config(tmp_path / "ds.json", bf16={"enabled": True}, zero_optimization=zero(stage), train_micro_batch_size_per_gpu=4)
    found = _train(recipe_file, tmp_path / "run", *KD, *ENSEMBLE, *evaluations, ds=config)
    assert len(found) == 6
    assert (tmp_path / "run" / "evaluation.json").is_file()
    assert events(tmp_path / "run", "evaluation")


def test_the_giant_recipe_takes_its_first_steps_with_a_real_tower_in_8_bit(world: Path, tmp_path: Path) -> None:
    """ViT-bigG-14 by ZeRO-3 in int8, as `slurm/distill_vitbigG.sh` runs it, on random weights and few pairs."""
    few = ("optim.steps=2", "optim.batch=64", "optim.warmup=1", "log.every=1")
    sets = (f"data.train={world}/train/*.tar", "teacher.pretrained=random", *few)
    found = _train("distill_vitbigG", tmp_path / "run", *sets)
    assert [row["step"] for row in found] == [1, 2]


def test_a_decoder_with_lora_learns_to_answer_in_16_8_and_4_bit(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    """The language model is trained on text first: one of random weights has nothing to quantise."""
    unseen = question_source(world, "test", images=False)
    reading = tmp_path / "reading.toml"
    reading.write_text(
        f"name = 'reading'\n[data]\nworkers = 0\n[decoder]\ntokenizer = '{world}/tokenizer'\nadapt = 'full'\narchitecture = {LANGUAGE}\n"
        f"template = '{{question}}'\ninstruction = ''\n[answers]\nmax_length = 160\n"
        f"train.text = {{ format = 'llava', questions = '{world}/questions/train_text.json' }}\n"
        f"[optim]\nsteps = 6\nbatch = 8\nlr = 1e-2\n[evaluation]\nvqa.test = {unseen}\n[log]\nevery = 1\n",
        encoding="utf-8",
    )
    _train(reading, tmp_path / "reader")
    for quantise in ("none", "int8", "nf4"):
        sets = (f"decoder.model={tmp_path}/reader/bundle/language", *answering(world), "objectives.contrastive=0.0")
        out = tmp_path / quantise
        assert len(_train(recipe_file, out, *sets, f"decoder.quantise={quantise}")) == 6
        assert json.loads((out / "vqa.json").read_text(encoding="utf-8"))["sets"]["test"]["questions"] > 100


@pytest.mark.parametrize("mode", ["replicated", "replicated_int8", "zero3", "zero3_int8"])
def test_a_store_is_written_checked_and_trained_from(recipe_file: Path, tmp_path: Path, mode: str) -> None:
    sets = settings(*KD, f"teacher.mode={mode}")
    store = tmp_path / "store"
    _run("-m", "megakd.cli", "embed", "--recipe", recipe_file, "--views", "1", "--out", store, *sets)
    _run("-m", "megakd.cli", "embed", "--recipe", recipe_file, "--views", "1", "--out", store, "--check", *sets)
    assert len(_train(recipe_file, tmp_path / "run", *KD, f"teacher.mode={mode}", f"teacher.store={store}", "teacher.store_miss=fail")) == 6
