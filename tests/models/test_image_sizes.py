"""Teachers of images alone that see images of another size than their weights were trained on, `teacher.image_size`: what timm's and
transformers' own ways of interpolating positions give, and sizes that are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import eva, swin_transformer, vision_transformer
from torch import Tensor
from torch.nn import functional as F

from megakd.models import clip, streaming
from megakd.models.fingerprint import fingerprint, preprocessing
from megakd.recipe import Teacher
from megakd.recipe.placements import MODES
from megakd.runtime import launch
from megakd.runtime.launch import World
from megakd.teachers.build import load
from support import image_teachers  # noqa: F401  (registers the models)
from support.runs import ran, train
from support.transformers_folders import save

# kind: timm's name, (H, W) in place of the tag's, side of a patch of the last block
SIZES: dict[str, tuple[str, tuple[int, int], int]] = {
    "ViT": ("test_vit", (96, 192), 16),
    "ViT with registers": ("megakd_tiny_dino", (28, 56), 14),
    "ViT with a map head": ("test_vit4", (96, 128), 16),
    "EVA": ("megakd_tiny_eva", (96, 64), 16),
    "rotary": ("megakd_tiny_dinov3", (64, 32), 16),
    "relative positions": ("megakd_tiny_swin", (96, 72), 8),
    "SAM": ("megakd_tiny_sam", (64, 32), 16),
    "convolutional": ("test_convnext", (64, 96), 32),
}  # fmt: skip
_FILTERS: dict[str, Any] = {
    "VisionTransformer": vision_transformer.checkpoint_filter_fn,
    "Eva": eva.checkpoint_filter_fn,
    "SwinTransformer": swin_transformer.checkpoint_filter_fn,
}


def _pixels(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def _by_timm(name: str, weights: dict[str, Tensor], size: tuple[int, int], pixels: Tensor) -> Tensor:
    """As timm does when a checkpoint of one size is loaded into a model that is made for another."""
    of = type(timm.create_model(name)).__name__
    model: Any = timm.create_model(name, num_classes=0, **({"img_size": size} if of in _FILTERS else {})).eval()
    model.load_state_dict(_FILTERS[of](dict(weights), model) if of in _FILTERS else weights)
    with torch.no_grad():
        return F.normalize(model(pixels), dim=-1)


@pytest.fixture
def alone() -> Iterator[World]:
    yield launch.start()
    launch.stop()


@pytest.mark.parametrize("kind", SIZES)
def test_a_timm_model_sees_what_timm_makes_of_its_weights_for_that_size(kind: str, alone: World, tmp_path: Path) -> None:
    name, size, patch = SIZES[kind]
    torch.manual_seed(3)
    weights = timm.create_model(name, num_classes=0).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    pixels = _pixels(size)
    wanted = _by_timm(name, weights, size, pixels)
    given = {"model": f"timm:{name}", "pretrained": str(tmp_path / "weights.safetensors"), "image_size": list(size)}
    for mode in MODES:
        description = clip.resolve(Teacher(**given, mode=mode), "teacher")
        assert preprocessing(description).size == size
        teacher = load(description, alone, streaming.Int8() if mode.endswith("int8") else None)
        image_BD, features = teacher.see(pixels, [-1])
        torch.testing.assert_close(image_BD, wanted, rtol=0.0, atol=0.03 if mode.endswith("int8") else 1e-5)
        assert features["patches.-1"].shape[1:3] == (size[0] // patch, size[1] // patch)


RESIZED = {"dinov2": (56, 28), "dinov3": (64, 32), "siglip": (48, 40), "clip": (48, 24), "internvl": (56, 28)}


@pytest.mark.parametrize("kind", RESIZED)
def test_a_tower_of_transformers_sees_what_its_class_makes_of_that_size(kind: str, alone: World, tmp_path: Path) -> None:
    model: Any = save(kind, tmp_path)
    size = RESIZED[kind]
    pixels, asked = _pixels(size), {"interpolate_pos_encoding": True} if kind in ("siglip", "clip") else {}
    output = model(pixels, **asked)
    pooled = output.last_hidden_state[:, 0] if kind == "internvl" else output.pooler_output
    for mode in MODES:
        description = clip.resolve(Teacher(model=f"transformers:{tmp_path}", image_size=size, mode=mode), "teacher")
        assert preprocessing(description).size == size
        found = load(description, alone, streaming.Int8() if mode.endswith("int8") else None).embed_images(pixels)
        torch.testing.assert_close(found, F.normalize(pooled, dim=-1), rtol=0.0, atol=0.03 if mode.endswith("int8") else 1e-5)


def _teacher(kind: str, **more: Any) -> Teacher:
    return Teacher(**{"model": f"timm:megakd_tiny_{kind}", "pretrained": "random", **more})


def test_the_size_is_a_part_of_what_identifies_a_teacher_and_the_tags_own_changes_nothing(tmp_path: Path) -> None:
    """What a store is compared by, should one hold such teachers."""
    sizes: tuple[dict[str, Any], ...] = ({}, {"image_size": 42}, {"image_size": 56})
    own, same, other = (fingerprint(clip.resolve(_teacher("dino", **more), "teacher"), 0) for more in sizes)
    assert own == same
    assert own["teacher"] != other["teacher"]
    assert (own["preprocess"]["size"], other["preprocess"]["size"]) == ([42, 42], [56, 56])
    save("dinov2", tmp_path)
    at_42, at_56 = (clip.resolve(Teacher(model=f"transformers:{tmp_path}", image_size=size), "teacher") for size in (42, 56))
    assert fingerprint(at_42, 0)["teacher"] != fingerprint(at_56, 0)["teacher"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (_teacher("dino", image_size=[28, 50]), r"teacher\.image_size = \[28, 50\]: .* of 28 x 50 pixels are no whole patches of 14 x 14"),
        (_teacher("hiera", image_size=128), r"teacher\.image_size = \[128, 128\]: timm:megakd_tiny_hiera: timm's Hiera has positions of"),
        (Teacher(model="timm:beit_base_patch16_224", pretrained="random", image_size=256), r"timm.s Beit has positions of one size"),
    ],
)  # fmt: skip
def test_a_size_that_a_timm_model_cannot_take_is_refused(given: Teacher, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip.resolve(given, "teacher")


def test_a_size_that_a_tower_of_transformers_cannot_take_is_refused(tmp_path: Path) -> None:
    save("sam", tmp_path / "sam")
    with pytest.raises(ValueError, match=r"image_size = \[64, 64\]: SamVisionModel takes images of 48 x 48 alone"):
        clip.resolve(Teacher(model=f"transformers:{tmp_path}/sam", image_size=64), "teacher")
    save("dinov2", tmp_path / "dinov2")
    with pytest.raises(ValueError, match=r"image_size = \[45, 42\]: images of 45 x 42 pixels are no whole patches of 14 x 14"):
        clip.resolve(Teacher(model=f"transformers:{tmp_path}/dinov2", image_size=(45, 42)), "teacher")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"model": "timm:test_vit", "image_size": 0}, r"image_size"),
        ({"model": "timm:test_vit", "image_size": [64]}, r"image_size"),
        ({"model": "timm:test_vit", "image_size": True}, r"image_size"),
    ],
)
def test_bad_sizes_are_refused_by_the_recipe(sets: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(**sets)


def test_a_run_learns_from_its_patches_on_the_grid_of_that_size(recipe_file: Path, tmp_path: Path) -> None:
    """A teacher of 2 x 2 patches at the tag's size has 4 x 4 at this one, as the student; 8 bit and partitioned."""
    model = ("teacher.model=timm:megakd_tiny_classifier", "teacher.pretrained=random", "teacher.preprocess=first", "teacher.image_size=64")
    learned = ("objectives.contrastive=0", "objectives.patch=1", "patch.blocks=[-1]", "optim.steps=2", "optim.warmup=0")
    sets = (*model, *learned, "teacher.mode=zero3_int8")
    shown = train(recipe_file, "--dry_run", sets=sets)
    assert shown.code == 0, shown.err
    assert "pixels (3, 64, 64) -> (48,)" in shown.out
    ran(recipe_file, tmp_path / "run", *sets)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["teacher"]
    assert recorded["image_size"] == [64, 64]
    again = train(recipe_file, "--out", tmp_path / "run", "--resume", "auto", sets=(*sets, "teacher.image_size=32"))
    assert again.code == 2
    assert "teacher.image_size" in again.err
