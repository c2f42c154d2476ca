"""The recipes of the papers: each trains with its own objectives and settings, and starts on shards in its layout with its real models."""

from __future__ import annotations

import json
import shutil
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from megakd.recipe import load as recipes
from support.runs import REPOSITORY, rows, train

CLIPKD = (
    "clipkd_vitt16_cc12m",
    "clipkd_vitb16_cc12m",
    *(f"clipkd_vitt16_cc12m_{teacher}" for teacher in ("b16cc", "b16laion", "l14laion")),
)
PAPERS = (*CLIPKD, "tinyclip_vit39m", "mobileclip2_s0", "dense_vqa", "siglip_kd", "radio_style")
# Models' tokenizers come with open_clip; SigLIP's are files of the Hub, in whose place a dry run without a network has the world's.
OF_THE_HUB = {"siglip_kd": ("student", "teacher"), "radio_style": ("ensemble.siglip",)}
NAMES_A_MODEL = {"model", "architecture", "pretrained", "recipe"}


def _tiny(settings: dict[str, Any], width: int, world: Path, *, bias: bool) -> dict[str, Any]:
    """A model of the section with two blocks, and what else the recipe says of it."""
    vision = {"image_size": 32, "patch_size": 8, "width": width, "layers": 2, "head_width": 16}
    text = {"context_length": 32, "vocab_size": 128, "width": width, "heads": 2, "layers": 1}
    architecture = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **({"init_logit_bias": -10.0} if bias else {})}
    kept = {key: value for key, value in settings.items() if key not in NAMES_A_MODEL}
    return {**kept, "architecture": architecture, "tokenizer": f"{world}/tokenizer"}


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_recipe_trains_with_tiny_models(name: str, world: Path, tmp_path: Path) -> None:
    content = tomllib.loads((resources.files("megakd.recipe.shipped") / f"{name}.toml").read_text(encoding="utf-8"))
    bias = any(objective.startswith("sigmoid") for objective in content["objectives"])
    content["student"] = _tiny(content["student"], 32, world, bias=bias)
    for number, (section, key) in enumerate(
        [(content, "teacher"), *((content.get("ensemble", {}), key) for key in content.get("ensemble", {}))]
    ):
        if key in section:
            section[key] = {**_tiny(section[key], 48 + 16 * number, world, bias=bias), "pretrained": "random"}
    content["data"] |= {"train": f"{world}/train/*.tar", "workers": 0}
    content["optim"] |= {"batch": 16, "steps": 3, "warmup": 1}
    content["log"] = {"every": 1}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": content}), encoding="utf-8")
    finished = train(tmp_path / "run.json", "--out", tmp_path / "run")
    assert finished.code == 0, finished.err
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert set(rows(tmp_path / "run")[0]["losses"]) == {name for name, weight in content["objectives"].items() if weight}


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_recipe_passes_its_dry_run_on_shards_in_its_layout(name: str, world: Path, tmp_path: Path) -> None:
    """Numbered tars with img2dataset's statistics beside them; the real models' configurations, without a weight."""
    for number, shard in enumerate(sorted((world / "train").glob("*.tar"))):
        shutil.copy(shard, tmp_path / f"{number:05d}.tar")
        (tmp_path / f"{number:05d}_stats.json").write_text('{"count": 230, "successes": 200}', encoding="utf-8")
    shards = f"{tmp_path}/{{00000..00002}}.tar"
    tokenizers = (f"{role}.tokenizer={world}/tokenizer" for role in OF_THE_HUB.get(name, ()))
    sets = (f"data.train={json.dumps(shards)}", "data.workers=0", "optim.batch=64", *tokenizers)
    finished = train(name, "--dry_run", "--out", tmp_path / "run", sets=sets)
    assert finished.code == 0, finished.err


def test_the_feature_weight_of_clip_kd_is_that_of_its_code() -> None:
    """2000 times the mean over batch and width of both modalities' squares, summed: ours is half the sum over the width."""
    for name, width in (("b16cc", 512), ("b16laion", 512), ("l14laion", 768)):
        assert recipes.load(f"clipkd_vitt16_cc12m_{name}")[0].objectives.feature == pytest.approx(2000 * 2 / width, abs=0.01)


def test_every_recipe_of_a_paper_is_in_the_table_of_objectives() -> None:
    table = (REPOSITORY / "megakd" / "objectives" / "README.md").read_text(encoding="utf-8")
    assert [name for name in PAPERS if f"`{name}`" not in table] == []


def test_clip_kds_student_schedule_and_weights_are_those_of_the_paper() -> None:
    """ViT-T/16 of width 192, not open_clip's model of that name; 32 epochs of CC3M and CC12M."""
    tower = {"image_size": 224, "layers": 12, "width": 192, "patch_size": 16, "head_width": 64}
    texts = {"context_length": 77, "vocab_size": 49408, "width": 384, "heads": 6, "layers": 12}
    for name in ("", "_b16cc", "_b16laion", "_l14laion"):
        recipe = recipes.load(f"clipkd_vitt16_cc12m{name}")[0]
        assert recipe.student is not None
        assert recipe.student.architecture == {"embed_dim": 512, "vision_cfg": tower, "text_cfg": texts}
        optim = recipe.optim
        assert (optim.batch, optim.steps, optim.lr, optim.warmup, optim.weight_decay) == (1024, 402_000, 1e-3, 10_000, 0.1)
        taught = {"similarity": 1.0, "interactive": 1.0, "feature": recipe.objectives.feature} if name else {}
        assert recipe.active() == {"contrastive": 1.0, **taught}


def test_mobileclip2s_teachers_have_its_scales_and_nothing_else_is_learned() -> None:
    recipe = recipes.load("mobileclip2_s0")[0]
    assert recipe.active() == {"similarity": 1.0}
    assert [teacher.scale for teacher in recipe.teachers().values()] == [70.0, 60.0]
