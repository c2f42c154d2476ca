"""Runs whose student begins with weights from elsewhere: what they say, what run.json keeps, and what a resumed one does not need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import PROGRAMS
from support.runs import megakd, ran, run_ranks, train
from support.starts import built

WIDER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 128, "width": 48, "heads": 3, "layers": 1},
}


def _folder(path: Path, tokenizer: Path) -> Path:
    """A model as open_clip reads it."""
    made = built(WIDER, tokenizer)
    path.mkdir()
    words = {**WIDER["text_cfg"], "hf_tokenizer_name": str(tokenizer)}  # type: ignore[dict-item]
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**WIDER, "text_cfg": words}, "preprocess_cfg": {}}))
    save_file({name: value.clone() for name, value in made.clip.state_dict().items()}, path / "open_clip_model.safetensors")
    for file in tokenizer.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.fixture(scope="module")
def wider(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("wider") / "model", world / "tokenizer")


def test_a_run_says_where_its_student_comes_from_and_its_run_json_keeps_it(recipe_file: Path, wider: Path, tmp_path: Path) -> None:
    inherit = f"student.inherit={{ model = 'local-dir:{wider}' }}"
    run = tmp_path / "run"
    dry = train(recipe_file, "--dry_run", "--out", run, sets=[inherit])
    assert dry.code == 0, dry.err
    line = next(line for line in dry.out.splitlines() if line.startswith("student begins with: "))
    assert line.startswith(f"student begins with: image tower: 20 tensors from local-dir:{wider} (student.inherit); text tower: 17 tensors")
    finished = train(recipe_file, "--out", run, sets=[inherit, "optim.lr=1e-30"])
    assert finished.code == 0, finished.err
    assert line in finished.out
    record = json.loads((run / "run.json").read_text())["student_start"]
    assert record["image tower"] == {"tensors": {f"local-dir:{wider} (student.inherit)": 20}, "new": []}
    assert "image width 32 of 48" in " ".join(record["notes"]["student.inherit"])
    trained, source = load_file(run / "model" / "open_clip_model.safetensors"), load_file(wider / "open_clip_model.safetensors")
    assert torch.equal(trained["visual.proj"], source["visual.proj"][:32])


def test_a_run_without_such_keys_says_that_everything_is_new(recipe_file: Path, tmp_path: Path) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", sets=["optim.steps=3"])
    assert "student begins with: image tower: all 20 new; text tower: all 17 new; the rest: 1 new (logit_scale)" in finished.out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["student_start"]["text tower"] == {"tensors": {}, "new": "all"}


def test_a_resumed_run_needs_the_weights_no_more_and_refuses_others(recipe_file: Path, world: Path, tmp_path: Path) -> None:
    wider, run = _folder(tmp_path / "model", world / "tokenizer"), tmp_path / "run"
    inherit = f"student.inherit={{ model = 'local-dir:{wider}' }}"
    constant = "optim={ steps = 3, batch = 16, lr = 1e-3, warmup = 0, schedule = 'constant' }"
    ran(recipe_file, run, inherit, constant)
    whole = ran(recipe_file, tmp_path / "whole", inherit, constant, "optim.steps=4")
    (wider / "open_clip_model.safetensors").unlink()
    refused = train(recipe_file, "--out", run, sets=[inherit[:-2] + ", layers = 'first' }", constant, "optim.steps=4"])
    assert "student.inherit.layers: 'even' -> 'first'" in refused.err
    record = json.loads((run / "run.json").read_text())["student_start"]
    ran(recipe_file, run, inherit, constant, "optim.steps=4")
    assert json.loads((run / "run.json").read_text())["student_start"] == record
    one, other = (load_file(folder / "model" / "open_clip_model.safetensors") for folder in (run, whole))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_missing_weights_end_a_run_before_it_begins_with_one_message(recipe_file: Path, tmp_path: Path) -> None:
    finished = train(recipe_file, "--out", tmp_path / "run", sets=["student.image_weights=none.safetensors"])
    assert finished.code == 2
    assert "student.image_weights = 'none.safetensors': none.safetensors: no such file" in finished.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_student_learns_from_the_teacher_whose_text_tower_it_has(recipe_file: Path, wider: Path, world: Path, tmp_path: Path) -> None:
    """It is evaluated and planned from its run alone, whose recipe has no text_cfg."""
    student = "{ architecture = { vision_cfg = { image_size = 32, patch_size = 8, width = 32, layers = 1, head_width = 16 } } }"
    keys = [f"student={student}", "student.text_from=teacher", f"teacher.model=local-dir:{wider}", "objectives.similarity=1.0"]
    run = ran(recipe_file, tmp_path / "run", *keys, "optim.lr=1e-30")
    trained, source = load_file(run / "model" / "open_clip_model.safetensors"), load_file(wider / "open_clip_model.safetensors")
    assert torch.equal(trained["token_embedding.weight"], source["token_embedding.weight"])
    words = [json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"] for folder in (run / "model", wider)]
    assert words[0] == words[1]
    assert megakd("evaluate", run, "--set", f"evaluation.retrieval.test={world}/test/*.tar") == 0
    assert json.loads((run / "evaluation.json").read_text())["retrieval"]["test"]
    assert megakd("plan", "--recipe", run / "run.json", "--gpus", 2, "--gpu_memory", 80, "--json", tmp_path / "plan.json") == 0


def test_a_teacher_that_another_recipe_trains_first_is_known_by_that_recipe(recipe_file: Path, tmp_path: Path) -> None:
    student = "{ architecture = { vision_cfg = { image_size = 32, patch_size = 8, width = 16, layers = 1, head_width = 16 } } }"
    inherit = "student.inherit={ model = 'teacher', towers = 'image' }"
    teacher = [f"teacher.model=local-dir:{tmp_path}/teacher/model", f"teacher.recipe={recipe_file}", "objectives.similarity=1.0"]
    dry = train(recipe_file, "--dry_run", "--out", tmp_path, sets=[f"student={student}", "student.text_from=teacher", inherit, *teacher])
    assert dry.code == 0, dry.err
    waiting = f"from local-dir:{tmp_path}/teacher/model (student.{{}}), which is not on this machine yet"
    assert (
        f"image tower: {waiting.format('inherit.model')}; text tower: {waiting.format('text_from')}; the rest: 1 new (logit_scale)"
        in dry.out
    )
    wide = student.replace("width = 16", "width = 64")
    dry = train(recipe_file, "--dry_run", "--out", tmp_path, sets=[f"student={wide}", "student.text_from=teacher", inherit, *teacher])
    assert "image width 32 there, 64 in the student" in dry.err


@pytest.mark.slow
def test_what_the_first_rank_reads_is_on_every_rank(wider: Path, world: Path, tmp_path: Path) -> None:
    inherit = {"model": f"local-dir:{wider}", "towers": "image"}
    keys = {"architecture": WIDER, "tokenizer": str(world / "tokenizer"), "inherit": inherit}
    (tmp_path / "student.json").write_text(json.dumps(keys))
    run_ranks(PROGRAMS / "started.py", tmp_path / "student.json", tmp_path / "tower")
    source = load_file(wider / "open_clip_model.safetensors")
    for rank in (0, 1):
        tower = load_file(tmp_path / f"tower.{rank}.safetensors")
        assert [name for name in tower if not torch.equal(tower[name], source[name])] == []


def test_a_frozen_text_tower_stays_the_teachers_and_a_resumed_run_goes_on_with_it(recipe_file: Path, wider: Path, tmp_path: Path) -> None:
    student = "{ architecture = { vision_cfg = { image_size = 32, patch_size = 8, width = 32, layers = 1, head_width = 16 } } }"
    optim = "optim={{ steps = {}, batch = 16, lr = 1e-2, warmup = 0, schedule = 'constant' }}"
    keys = [f"student={student}", "student.text_from=teacher", "student.freeze=['text']", f"teacher.model=local-dir:{wider}"]
    run = ran(recipe_file, tmp_path / "run", *keys, optim.format(3))
    ran(recipe_file, run, *keys, optim.format(4))
    whole = ran(recipe_file, tmp_path / "whole", *keys, optim.format(4))
    one, other, source = (load_file(folder / "open_clip_model.safetensors") for folder in (run / "model", whole / "model", wider))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    text = [name for name in one if not name.startswith(("visual.", "logit_scale"))]
    assert [name for name in text if not torch.equal(one[name], source[name])] == []
