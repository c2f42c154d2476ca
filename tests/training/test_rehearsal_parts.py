"""The rest of a GPU's branch on the CPU: stores and their check, evaluations, decoders, bundles, and two ranks, all in bf16."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megakd.cli import app
from megakd.data.store.reader import StoreError
from megakd.evaluation import run as evaluation_run
from megakd.recipe import load as recipes
from megakd.runtime import precision
from megakd.runtime.launch import start, stop
from megakd.teachers import embed
from support.decoders import make_decoder
from support.runs import KD, TEACHER, TRAIN, answering, ds_config, events, rows, run_ranks, settings, train, zero

STEPS = ("optim.steps=2", "optim.warmup=0", "optim.batch=8")
RESNET = "student.architecture.vision_cfg={ image_size = 64, layers = [1, 1, 1, 1], width = 8, head_width = 16 }"
# quantise, ZeRO stage, pieces, tower, the student's own tower
DECODERS = {
    "LoRA, stage 1": ("none", 1, 1, "trained", ""),
    "LoRA, stage 2": ("none", 2, 2, "frozen", RESNET),
    "LoRA, stage 3": ("none", 3, 2, "trained", ""),
    "int8": ("int8", 1, 2, "trained", RESNET),
    "nf4": ("nf4", 2, 1, "frozen", ""),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(precision.VARIABLE, "bf16")


@pytest.fixture(scope="module")
def language(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    make_decoder(world / "tokenizer", None).write_language(folder)
    return folder


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_learns_beside_the_objectives_is_judged_and_answers(
    name: str, recipe_file: Path, world: Path, language: Path, evaluations: tuple[str, ...], tmp_path: Path
) -> None:
    quantise, stage, pieces, tower, own = DECODERS[name]
    config = ds_config(tmp_path / "ds.json", bf16={"enabled": True}, zero_optimization=zero(stage), gradient_accumulation_steps=pieces)
    asked = (f"decoder.model={language}", *answering(world), f"decoder.quantise={quantise}", f"answers.tower={tower}")
    sets = (*KD, *STEPS, *evaluations, *asked, *filter(None, [own]))
    run = train(recipe_file, "--out", tmp_path / "run", "--ds_config", config, sets=sets)
    assert run.code == 0, run.err
    assert all(math.isfinite(row["loss"]) and row["losses"]["answer"] > 0 for row in rows(tmp_path / "run"))
    (judged,) = events(tmp_path / "run", "evaluation")
    assert {"zero_shot", "retrieval", "hard_negatives", "vqa"} <= judged["content"].keys()
    with tarfile.open(world / "test" / "00000.tar") as shard:
        image = shard.extractfile(next(member for member in shard.getnames() if member.endswith((".png", ".jpg", ".webp"))))
        assert image is not None
        (tmp_path / "image").write_bytes(io.BytesIO(image.read()).getvalue())
    answered = CliRunner().invoke(app, ["answer", str(tmp_path / "run" / "bundle"), str(tmp_path / "image"), "how many are there?"])
    assert answered.exit_code == 0, answered.output
    evaluation_run.evaluate_run(tmp_path / "run", None, [])
    again = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    # the optimizer's float32 weights are judged, in float32, in the run and after it
    assert again["retrieval"] == judged["content"]["retrieval"]


@pytest.mark.parametrize("mode", ["replicated", "zero3_int8"])
def test_a_store_in_bf16_is_checked_and_is_no_store_for_float32(
    mode: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = recipes.load(str(recipe_file), [*TEACHER, "objectives.similarity=1.0", f"teacher.mode={mode}", "evaluation.batch=50"])
    world = start()
    try:
        job = embed.EmbedJob(recipe, embed.EmbedRequest(tmp_path / "store", 2), world)
        assert job.embed().made["precision"] == "bf16"
        assert job.check(64).worst_cosine > 0.999
        monkeypatch.setenv(precision.VARIABLE, "fp32")
        with pytest.raises(StoreError, match="precision"):
            embed.EmbedJob(recipe, embed.EmbedRequest(tmp_path / "store", 2), world).embed()
    finally:
        stop()


@pytest.mark.slow
def test_two_ranks_train_as_one_does(recipe_file: Path, tmp_path: Path) -> None:
    """A teacher in pieces of 8 bit, a student in pieces of bf16, gradients of two micro-batches."""
    vit = "{ image_size = 160, timm_model_name = 'test_vit', timm_model_pretrained = false, timm_pool = 'token', timm_proj = 'linear' }"
    text = "{ context_length = 24, width = 32, heads = 2, layers = 1 }"
    teacher = (f"teacher.architecture={{ embed_dim = 24, vision_cfg = {vit}, text_cfg = {text} }}", TEACHER[1], "teacher.mode=zero3_int8")
    sets = (*teacher, "objectives.similarity=2.0", "objectives.feature=0.5", *STEPS)
    config = ds_config(tmp_path / "ds.json", bf16={"enabled": True}, zero_optimization=zero(3), gradient_accumulation_steps=2)
    one = train(recipe_file, "--out", tmp_path / "one", "--ds_config", config, sets=sets)
    assert one.code == 0, one.err
    command = ["--recipe", recipe_file, "--out", tmp_path / "two", "--ds_config", config, *settings(*sets)]
    run_ranks(TRAIN, *command)
    for single, double in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert double["losses"] == pytest.approx(single["losses"], rel=0.02)
        assert double["scale"] == pytest.approx(single["scale"], rel=1e-4)
