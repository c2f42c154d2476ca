"""LLaVA-1.5's two stages and the chain from bigG: each dry run is sound on files in their published layout, and says what comes first."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from megakd.recipe import load as recipes
from support import REPOSITORY, hub
from support import questions as files
from support.questions import talk, write, write_images
from support.runs import TRAIN, environment, train

SETS = ["gqa", "scienceqa", "textvqa", *(f"pope_{kind}" for kind in ("random", "popular", "adversarial"))]
SETS += ["seed_bench", "vizwiz_val", "vizwiz_test", "vqav2_testdev"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/data of the recipes: LLaVA's training files and its playground/data/eval."""
    data = tmp_path_factory.mktemp("data")
    entry = {"id": "004539375", "image": "00453/004539375.jpg", "conversations": talk("Describe it.\n<image>", "luxury furniture")}
    write(data / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json", [entry] * 256)
    write_images(data / "LLaVA-Pretrain" / "images", entry["image"])
    seen = {"id": "1", "image": "coco/train2017/000000033471.jpg", "conversations": talk("<image>\nWhat is it?", "A bus.", "Red?", "Yes")}
    write(data / "llava_v1_5_mix665k.json", [seen, {"id": "2", "conversations": talk("Write a haiku.", "Leaves fall.")}] * 64)
    write_images(data, seen["image"])
    of = {name: getattr(files, name) for name in ("gqa", "scienceqa", "textvqa", "pope", "seed", "vizwiz")}
    made = {name: make(data / "made" / name) for name, make in of.items()}
    at = data / "eval"
    for name, questions, images in (
        ("gqa", "gqa/data/testdev_balanced_questions.json", "gqa/data/images"),
        ("scienceqa", "scienceqa/problems.json", "scienceqa/images"),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", "textvqa/train_images"),
        *(("pope", f"pope/coco/coco_pope_{kind}.json", "pope/val2014") for kind in ("random", "popular", "adversarial")),
        ("seed", "seed_bench/SEED-Bench.json", "seed_bench/SEED-Bench-image"),
        *(("vizwiz", f"vizwiz/{split}.json", f"vizwiz/{split}") for split in ("val", "test")),
    ):
        (at / questions).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(made[name].questions), at / questions)
        shutil.copytree(str(made[name].images), at / images, dirs_exist_ok=True)
    shutil.copy(data / "made" / "scienceqa" / "pid_splits.json", at / "scienceqa")
    asked = {"data_subtype": "test-dev2015", "questions": files.vqav2_entries(2)[0]}
    write(at / "vqav2" / "v2_OpenEnded_mscoco_test-dev2015_questions.json", asked)
    write_images(at / "vqav2" / "test2015", "COCO_test2015_000000000040.jpg")
    return data


def shown(name: str, data: Path, folder: Path) -> str:
    """What the dry run of a shipped recipe shows, with `data` in the place of /data and Qwen's copy in the place of the hub."""
    text = (resources.files("megakd.recipe.shipped") / f"{name}.toml").read_text(encoding="utf-8")
    (folder / "R.toml").write_text(text.replace('"/data/', f'"{data}/').replace('"/data"', f'"{data}"'), encoding="utf-8")
    command = [sys.executable, TRAIN, "--recipe", folder / "R.toml", "--ds_config", REPOSITORY / "ds_configs" / "zero2_micro8_bf16.json"]
    places = {"env": environment(**hub.cached(folder / "hub")), "cwd": folder}
    done = subprocess.run([*command, "--dry_run"], **places, capture_output=True, text=True, timeout=300, check=False)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def first(text: str) -> list[str]:
    return [Path(line.split()[3]).stem for line in text.splitlines() if line.startswith("would run first: ")]


def test_llavas_first_stage_trains_the_projector_on_captions(data: Path, tmp_path: Path) -> None:
    text = shown("llava_align", data, tmp_path)
    assert "2181 steps of batch 256 = 1 ranks x 32 x 8, 558,336 questions in all; ZeRO 2, bf16; answers" in text
    assert "luxury furniture" in text
    assert "Describe it" not in text
    assert first(text) == ["dense_vqa"]


def test_llavas_second_stage_has_its_benchmarks_and_starts_from_the_first(data: Path, tmp_path: Path) -> None:
    text = shown("llava_mix665k", data, tmp_path)
    assert "5198 steps of batch 128 = 1 ranks x 16 x 8, 665,344 questions in all" in text
    assert first(text) == ["dense_vqa", "llava_align"]
    recipe = recipes.load("llava_mix665k")[0]
    assert list(recipe.evaluation.vqa) == SETS
    assert [name for name in SETS if name not in text] == []


def test_the_two_stages_have_llavas_settings() -> None:
    """pretrain.sh and finetune.sh of LLaVA; AdamW as transformers' Trainer has it. 3 % of an epoch's steps warm up."""
    for name, samples, batch, lr, adapt in (("llava_align", 558_128, 256, 1e-3, "none"), ("llava_mix665k", 665_298, 128, 2e-5, "full")):
        recipe = recipes.load(name)[0]
        assert recipe.decoder is not None
        assert recipe.answers is not None
        optim, steps = recipe.optim, -(-samples // batch)
        assert (optim.steps, optim.batch, optim.lr, optim.warmup) == (steps, batch, lr, -(-steps * 3 // 100))
        assert (optim.betas, optim.eps, optim.weight_decay, optim.clip, optim.schedule) == ((0.9, 0.999), 1e-8, 0.0, 1.0, "cosine")
        assert (recipe.decoder.adapt, recipe.decoder.layer, recipe.answers.max_length, recipe.answers.tower) == (adapt, -2, 2048, "frozen")


def test_the_chain_from_bigG_says_its_order(world: Path, tmp_path: Path) -> None:
    for number, shard in enumerate(sorted((world / "train").glob("*.tar"))):
        shutil.copy(shard, tmp_path / f"{number:05d}.tar")
    shards = f"{tmp_path}/{{00000..00002}}.tar"
    sets = (f"data.train={json.dumps(shards)}", "data.workers=0", "optim.batch=64")
    last = train("assistant_bigG_b16_t16", "--dry_run", "--out", tmp_path / "run", sets=sets)
    assert last.code == 0, last.err
    assert first(last.out) == ["assistant_bigG_b16"]
    assistant = train("assistant_bigG_b16", "--dry_run", "--out", tmp_path / "run", sets=sets)
    assert assistant.code == 0, assistant.err
    assert first(assistant.out) == []
    student, teacher = recipes.load("assistant_bigG_b16_t16")[0], recipes.load("assistant_bigG_b16")[0].teacher
    assert teacher is not None
    assert teacher.model == "ViT-bigG-14"
    assert student.student == recipes.load("clipkd_vitt16_cc12m_b16laion")[0].student
