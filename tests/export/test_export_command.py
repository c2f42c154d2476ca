"""`megakd export`: what it takes, what it refuses, and where it writes."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
import transformers

from megakd.runtime import checkpoint
from support.runs import ds_config, megakd, ran, train, zero


@pytest.fixture(scope="module")
def run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    assert train(recipe_file, "--out", folder).code == 0
    return folder


def test_a_run_is_exported_from_any_of_its_checkpoints(run: Path, tmp_path: Path) -> None:
    first, *_, last = checkpoint.available(run)
    for name, chosen in (("newest", []), ("first", ["--checkpoint", first])):
        assert megakd("export", run, "--to", "open_clip", "--out", tmp_path / name, *chosen) == 0
        model = open_clip.create_model(f"local-dir:{tmp_path / name}")
        weights = checkpoint.load_weights(last if name == "newest" else first)[1]
        assert all(torch.equal(value, weights[f"clip.{key}"].reshape(value.shape)) for key, value in model.state_dict().items())


def test_a_run_of_zero_3_is_exported_as_every_other(recipe_file: Path, tmp_path: Path) -> None:
    config = ds_config(tmp_path / "zero3.json", zero_optimization=zero(3))
    run = ran(recipe_file, tmp_path / "run", config=config)
    assert megakd("export", run, "--to", "transformers", "--out", tmp_path / "out") == 0
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    trained = checkpoint.load_weights(checkpoint.available(run)[-1])[1]
    assert torch.equal(model.visual_projection.weight, trained["clip.visual.proj"].T)
    assert torch.equal(model.text_model.embeddings.token_embedding.weight, trained["clip.token_embedding.weight"])


def test_an_earlier_export_is_replaced_and_a_folder_with_other_things_is_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert megakd("export", run, "--to", "open_clip", "--out", out) == 0
    assert megakd("export", out, "--to", "open_clip", "--out", tmp_path / "again") == 0, "what was exported is a source as well"
    assert megakd("export", run, "--to", "open_clip", "--out", out) == 0
    assert set(json.loads((out / "export.json").read_text())["files"]) == {path.name for path in out.iterdir()} - {"export.json"}
    (out / "thesis.tex").write_text("a year's work")
    assert megakd("export", run, "--to", "open_clip", "--out", out) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (out / "thesis.tex").read_text() == "a year's work"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "open_clip"], "give either a run's folder, or a model"),
        (["RUN", "--model", "ViT-B-32", "--to", "open_clip"], "give either a run's folder, or a model"),
        (["RUN", "--to", "openclip"], "--to openclip: did you mean 'open_clip'"),
        (["RUN", "--pretrained", "openai", "--to", "open_clip"], "--pretrained: goes with --model"),
        (["--model", "ViT-B-32", "--checkpoint", "x", "--to", "open_clip"], "--checkpoint: is of a run"),
        (["--model", "ViT-B-23", "--pretrained", "random", "--to", "open_clip"], "nearest: ViT-B-32"),
        (["--model", "timm:vit_tiny_patch16_224", "--pretrained", "random", "--to", "open_clip"], "has no text tower"),
        (
            ["--model", "timm:vit_tiny_patch16_224", "--pretrained", "random", "--to", "transformers"],
            "no norm before its blocks",
        ),
        (["RUN", "--part", "image", "--to", "open_clip"], "--part image: open_clip's folders hold both towers"),
        (["nowhere", "--to", "open_clip"], "nowhere: neither a run"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], told: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert megakd("export", *(str(run) if one == "RUN" else one for one in arguments), "--out", tmp_path / "out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
