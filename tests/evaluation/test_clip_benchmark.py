"""Retrieval and zero-shot classes as CLIP_benchmark scores them: by its numbers, frozen here, and by the package itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from megakd.evaluation import retrieval
from support import PROGRAMS
from support.library_environments import CLIP_BENCHMARK, set_up
from support.programs.clip_benchmark_side import embeddings
from support.runs import environment, megakd, settings, train

JOB = PROGRAMS / "clip_benchmark_side.py"
# `python tests/support/programs/clip_benchmark_side.py table SEED`, by clip_benchmark 1.6.2
FROZEN = {
    0: {
        "image_to_text": {"R@1": 0.5666666626930237, "R@5": 0.9333333373069763, "R@10": 0.9666666388511658},
        "text_to_image": {"R@1": 0.4954954981803894, "R@5": 0.8288288116455078, "R@10": 0.9459459185600281},
    },
    1: {
        "image_to_text": {"R@1": 0.6000000238418579, "R@5": 0.8333333134651184, "R@10": 1.0},
        "text_to_image": {"R@1": 0.4126984179019928, "R@5": 0.8253968358039856, "R@10": 0.9285714030265808},
    },
}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for way in ("image_to_text", "text_to_image"):
        assert ours[way] == pytest.approx(theirs[way], abs=1e-9, rel=0)


@pytest.mark.parametrize("seed", FROZEN)
def test_several_captions_an_image_score_what_clip_benchmark_makes_of_them(seed: int) -> None:
    images, texts, image_of_text = embeddings(seed)
    assert_equal(retrieval.recalls(images, texts, torch.tensor(image_of_text)), FROZEN[seed])


@pytest.fixture(scope="module")
def clip_benchmark() -> Path:
    try:
        return set_up(CLIP_BENCHMARK)
    except ValueError as error:
        pytest.skip(str(error))


def _job(python: Path, *arguments: object) -> Any:
    command = [str(python), str(JOB), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    recalls = [line for line in done.stdout.splitlines() if line.startswith("RECALLS ")]
    return json.loads(recalls[0].removeprefix("RECALLS ")) if recalls else None


@pytest.mark.slow
@pytest.mark.parametrize("seed", FROZEN)
def test_the_frozen_numbers_are_those_of_the_package(clip_benchmark: Path, seed: int) -> None:
    assert _job(clip_benchmark, "table", seed) == FROZEN[seed]


@pytest.mark.slow
def test_a_run_scores_its_set_as_clip_benchmark_scores_the_runs_model(clip_benchmark: Path, recipe_file: Path, tmp_path: Path) -> None:
    _job(clip_benchmark, "write", tmp_path / "set")
    sets = (f"evaluation.retrieval={{ mine = '{tmp_path}/set/test/*.tar' }}", "optim.steps=8", "optim.lr=1e-2", "evaluation.batch=16")
    finished = train(recipe_file, "--out", tmp_path / "run", sets=sets)
    assert finished.code == 0, finished.err
    ours = json.loads((tmp_path / "run" / "evaluation.json").read_text())["retrieval"]["mine"]
    assert ours["images"] == 50
    assert ours["pairs"] > 100
    assert ours["repeated_captions"] == ours["unreadable"] == 0
    theirs = _job(clip_benchmark, "score", tmp_path / "set", tmp_path / "run" / "model")
    assert_equal(ours, theirs)
    assert 0 < theirs["text_to_image"]["R@10"] < 1


@pytest.mark.slow
def test_a_plain_folder_of_classes_scores_as_clip_benchmark_scores_it(clip_benchmark: Path, tmp_path: Path) -> None:
    """By a random model with CLIP's own tokenizer: to one of the shapes world most of ImageNet's names are the same unknown words."""
    draw, known = np.random.RandomState(0), ImageNetInfo("imagenet-1k").label_names()
    for label in range(0, 900, 100):
        for number in range(1 + draw.randint(9)):
            file = tmp_path / "imagenet" / "val" / known[label] / f"{number}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.randint(0, 255, (40, 48, 3)).astype(np.uint8)).save(file, "JPEG")
    model, out = tmp_path / "model", tmp_path / "scores.json"
    model.mkdir()
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
    towers = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {"context_length": 32, "width": 64, "heads": 4, "layers": 2}}
    (model / "open_clip_config.json").write_text(json.dumps({"model_cfg": towers, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(open_clip.create_model(f"local-dir:{model}", load_weights=False).state_dict(), model / "open_clip_model.safetensors")
    wanted = settings(f"evaluation.zero_shot.mine={tmp_path}/imagenet", "evaluation.batch=16", "data.workers=0")
    assert megakd("evaluate", "--model", f"local-dir:{model}", *wanted, "--out", out) == 0
    ours = json.loads(out.read_text())["zero_shot"]["mine"]
    theirs = _job(clip_benchmark, "classify", tmp_path / "imagenet" / "val", model)
    assert theirs["top1"] != pytest.approx(theirs["mean_per_class_recall"])
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-9, rel=0)
    assert "open_clip's names of ImageNet's classes" in ours["classes"]
