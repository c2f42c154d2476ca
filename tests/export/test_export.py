"""What is exported is loaded by open_clip once, and compared, before it gets its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file, save_file

from megakd.export import clip_folder
from megakd.models import clip
from megakd.recipe import Model, Preprocess
from support import edit_json
from support.runs import train

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 128, "width": 32, "heads": 2, "layers": 1},
    "init_logit_bias": -3.0,
    "quick_gelu": True,
}


def _built(world: Path, **more: Any) -> tuple[clip.ClipModel, dict[str, torch.Tensor]]:
    described = clip.resolve(Model(architecture=ARCHITECTURE, tokenizer=str(world / "tokenizer"), **more), "student")
    built = clip.build(described, torch.device("cpu"))
    return built, {f"clip.{name}": value.clone() for name, value in built.clip.state_dict().items()}


def test_open_clip_loads_what_was_trained_with_its_preprocessing(world: Path, tmp_path: Path) -> None:
    preprocess = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bilinear", resize_mode="squash")
    built, weights = _built(world, preprocess=preprocess)
    clip_folder.write_model(tmp_path / "model", weights, built)
    theirs, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    assert all(torch.equal(value, weights[f"clip.{name}"]) for name, value in theirs.state_dict().items())
    assert (prepare.transforms[-1].mean, prepare.transforms[-1].std) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    again = clip.build(clip.resolve(Model(model=f"local-dir:{tmp_path / 'model'}"), "student"), torch.device("cpu"))
    assert again.preprocess == built.preprocess


CONFIG = "open_clip_config.json"


def _other_weights(folder: Path) -> None:
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"] *= 1.01
    save_file(weights, folder / "open_clip_model.safetensors")


def _edit(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / CONFIG, change)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_edit(lambda content: content["model_cfg"].update(quick_gelu=False)), "image differs"),
        (_edit(lambda content: content["preprocess_cfg"].update(mean=[0.0, 0.0, 0.0])), "prepares images"),
        (_edit(lambda content: content["model_cfg"]["text_cfg"].update(tokenizer_kwargs={"clean": "canonicalize"})), "other tokens"),
        (_other_weights, "image differs"),
    ],
    ids=["activation", "mean", "tokenizer", "weights"],
)
def test_an_export_that_open_clip_reads_otherwise_is_refused_and_the_earlier_one_stays(
    harm: Callable[[Path], None], told: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the export itself had a mistake: the real one is written, and harmed before it is looked at."""
    built, weights = _built(world)
    clip_folder.write_model(tmp_path / "model", weights, built)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    write = clip_folder._write_description

    def harmed(folder: Path, description: clip.ModelSpec) -> None:
        write(folder, description)
        harm(folder)

    monkeypatch.setattr(clip_folder, "_write_description", harmed)
    with pytest.raises(ValueError, match=told):
        clip_folder.write_model(tmp_path / "model", weights, built)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_a_tokenizer_that_open_clip_would_not_read_back_is_found_before_the_run(world: Path) -> None:
    """One that somebody made by hand with settings that no configuration has."""
    built, _ = _built(world)
    shouting = HFTokenizer(str(world / "tokenizer"), context_length=32, clean="canonicalize")
    description = clip.ModelSpec("student", built.description.settings, built.description.config, {}, shouting)
    with pytest.raises(ValueError, match=r"student: exported as open_clip reads it, its tokenizer gives other tokens"):
        clip_folder.rehearse(description)


def test_a_run_evaluates_and_exports_with_the_recipes_preprocessing(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    """`megakd evaluate` describes the student without the file that it started from, which may be gone."""
    from megakd.evaluation import run

    key = "student.preprocess={ mean = [0.0, 0.0, 0.0], std = [1.0, 1.0, 1.0], resize_mode = 'squash' }"
    sets = (key, f"evaluation.retrieval={{ test = '{world}/test/*.tar' }}", "evaluation.batch=60")
    assert train(recipe_file, "--out", tmp_path / "run", sets=sets).code == 0
    trained = json.loads((tmp_path / "run" / "evaluation.json").read_text())["retrieval"]
    config = json.loads((tmp_path / "run" / "model" / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["mean"] == [0.0, 0.0, 0.0]
    assert config["preprocess_cfg"]["resize_mode"] == "squash"
    run.evaluate_run(tmp_path / "run", None, [])
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["retrieval"] == trained
