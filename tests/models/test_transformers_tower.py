"""Teachers of images alone from folders of transformers: what their own classes see, and folders that are refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from megakd.models import clip, streaming
from megakd.models.fingerprint import preprocessing
from megakd.recipe import Student, Teacher
from megakd.recipe.placements import MODES
from megakd.runtime import launch
from megakd.runtime.launch import World
from megakd.teachers.build import load
from support.transformers_folders import KINDS, expected, processor, save, save_whole


def settings(folder: Path, **more: Any) -> Teacher:
    return Teacher(**{"model": f"transformers:{folder}", **more})


def images(size: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def alone() -> Iterator[World]:
    yield launch.start()
    launch.stop()


def taught(folder: Path, mode: str, world: World, pixels: Tensor, blocks: tuple[int, ...] = ()) -> Any:
    description = clip.resolve(settings(folder, mode=mode), "teacher")
    teacher = load(description, world, streaming.Int8() if mode.endswith("int8") else None)
    return teacher.embed(pixels, description.tokenize(["a"] * len(pixels)), blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_sees_what_the_class_of_transformers_does(kind: str, alone: World, tmp_path: Path) -> None:
    model, pixels = save(kind, tmp_path / "model"), images(KINDS[kind][2])
    pooled, maps = expected(kind, model, pixels)
    for mode in MODES:
        found = taught(tmp_path / "model", mode, alone, pixels, (0, -2, -1))
        exact = {"rtol": 0.0, "atol": 0.03 if mode.endswith("int8") else 1e-5}
        torch.testing.assert_close(found.image, F.normalize(pooled, dim=-1), **exact)
        for block in (0, -2, -1):
            expected_BhwC = maps[block % 3]
            size = float(expected_BhwC.abs().max())
            torch.testing.assert_close(found.features[f"patches.{block}"] / size, expected_BhwC / size, **exact)
        assert found.text.shape == (3, 0)
        assert bool(found.scale.isnan())


@pytest.mark.parametrize("kind", ["clip", "siglip", "sam"])
def test_of_a_larger_model_the_vision_tower_is_read(kind: str, alone: World, tmp_path: Path) -> None:
    _, tower = save_whole(kind, tmp_path / "model")
    pixels = images(48 if kind == "sam" else 32)
    output: Any = tower(pixels)
    pooled = output.last_hidden_state.mean((2, 3)) if kind == "sam" else output.pooler_output
    for mode in ("replicated", "zero3"):
        found = taught(tmp_path / "model", mode, alone, pixels)
        torch.testing.assert_close(found.image, F.normalize(pooled, dim=-1), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "dinov2_with_registers."])
def test_files_are_read_under_the_names_of_the_class_and_of_classifiers(prefix: str, alone: World, tmp_path: Path) -> None:
    model, pixels = save("registers", tmp_path), images(42)
    names = {f"{prefix}{name}": value for name, value in model.state_dict().items()}  # those since transformers 5
    if prefix:
        names |= {"classifier.weight": torch.ones(5, 96), "classifier.bias": torch.ones(5)}
    save_file(names, tmp_path / "model.safetensors")
    pooled, _ = expected("registers", model, pixels)
    torch.testing.assert_close(taught(tmp_path, "replicated", alone, pixels).image, F.normalize(pooled, dim=-1), rtol=0.0, atol=1e-5)


def test_pickled_tensors_are_read_as_those_of_every_teacher(alone: World, tmp_path: Path) -> None:
    model, pixels = save("dinov3", tmp_path), images(48)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    pooled, _ = expected("dinov3", model, pixels)
    torch.testing.assert_close(taught(tmp_path, "replicated", alone, pixels).image, F.normalize(pooled, dim=-1), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "siglip_resized", "sam", "internvl"])
def test_in_bf16_it_sees_nearly_the_same(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    description, pixels = clip.resolve(settings(tmp_path), "teacher"), images(KINDS[kind][2])
    exact, half = (clip.build(description, torch.device("cpu"), precision).clip.eval() for precision in ("fp32", "bf16"))
    with torch.no_grad():
        own, rounded = exact.encode_image(pixels), half.encode_image(pixels.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert float(F.cosine_similarity(own, rounded.float()).min()) > 0.999


def test_images_are_prepared_as_the_processor_says(tmp_path: Path) -> None:
    def prepared(stored: dict[str, Any], **more: Any) -> tuple[Any, ...]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
        found = preprocessing(clip.resolve(settings(tmp_path, **more), "teacher"))
        return found.size, found.mean, found.std, found.interpolation, found.resize_mode

    save("dinov2", tmp_path)
    usual = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert prepared(processor(42)) == ((42, 42), *usual, "bicubic", "squash")
    cropped = processor(42, size={"shortest_edge": 48}, do_center_crop=True, crop_size={"height": 28, "width": 28}, resample=2)
    assert prepared(cropped) == ((28, 28), *usual, "bilinear", "shortest")
    assert prepared(processor(42, size=28, crop_size=28, do_center_crop=True)) == ((28, 28), *usual, "bicubic", "shortest")
    padded = processor(42, size={"longest_edge": 28}, do_pad=True, pad_size={"height": 28, "width": 28})
    assert prepared(padded) == ((28, 28), *usual, "bicubic", "longest")
    assert prepared(processor(42, do_normalize=False))[1:3] == ((0.0,) * 3, (1.0,) * 3)
    assert prepared(processor(42), preprocess={"mean": [0.1, 0.2, 0.3]})[1] == (0.1, 0.2, 0.3)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor(28)}))
    assert preprocessing(clip.resolve(settings(tmp_path), "teacher")).size == (28, 28)
    (tmp_path / "processor_config.json").unlink()
    whole = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    assert preprocessing(clip.resolve(settings(tmp_path, preprocess=whole), "teacher")).size == (42, 42)


CONFIG = {"model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "patch_size": 14, "image_size": 42}


@pytest.mark.parametrize(
    ("config", "stored", "more", "message"),
    [
        ({"model_type": "resnet"}, {}, {}, "model_type = 'resnet' is no vision tower known here; known are dinov2, dinov2_with_reg"),
        ({"model_type": ["dinov2"]}, {}, {}, "is no vision tower known here; known are dinov2, dinov2_with_reg"),
        ({"auto_map": {"AutoModel": "x.Y"}, "architectures": ["RADIOModel"], "model_type": None}, {}, {},
         "needs code of its own .trust_remote_code., which never runs here; known are .*timm has C-RADIO: model = 'timm:vit_large"),
        ({"auto_map": {"AutoModel": "x.Y"}, "model_type": "intern_vit_6b"}, {}, {}, "timm has InternViT: model = 'timm:vit_intern300m"),
        ({"hidden_size": "wide"}, {}, {}, "config.json gives no model"),
        ({"patch_size": "large"}, {}, {}, "config.json gives no model"),
        ({}, None, {}, "no preprocessor_config.json there, so nothing says how its images are prepared; copy it .* or give the key"),
        ({}, {"image_mean": None}, {}, "preprocessor_config.json does not tell mean; give the key preprocess = { mean"),
        ({}, {"resample": 1}, {}, "preprocessor_config.json: resample = 1: of PIL's interpolations 2, bilinear, and 3, bicubic, alone"),
        ({}, {"do_rescale": False}, {}, "its images are not scaled to 0 to 1"),
        ({}, {"size": {"height": 45, "width": 45}}, {}, "images of 45 x 45 pixels are no whole patches of 14 x 14"),
        ({}, {}, {"pretrained": "lvd142m"}, "teacher.pretrained = 'lvd142m': 'transformers:.*brings its own weights; remove one"),
        ({}, {}, {"preprocess": "laion2b"}, "teacher.preprocess = 'laion2b': names a tag; for transformers:.* give { mean, std"),
        ({}, {}, {"tokenizer": "words"}, "teacher.tokenizer = 'words': transformers:.* has no text tower to read its words; take it out"),
        ({}, {}, {"scale": 70.0}, "teacher.scale = 70.0: transformers:.* has no text tower, and so no logits to scale; take it out"),
        ({}, {}, {"store": "rows"}, "teacher.store = 'rows': transformers:.* has no text tower, and a store holds embeddings of pairs"),
        ({}, {}, {}, "the folder has a configuration but no weights .model.safetensors."),
    ],
)  # fmt: skip
def test_what_is_no_such_teacher_is_refused_by_its_key(
    config: dict[str, Any], stored: dict[str, Any] | None, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if stored is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor(42), **stored}))
    with pytest.raises(ValueError, match=message):
        clip.resolve(settings(tmp_path, **more), "teacher")


def test_folders_and_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere': no such folder, and no name of a repository, ORG/NAME"):
        clip.resolve(settings(tmp_path / "nowhere"), "teacher")
    with pytest.raises(ValueError, match=r"no config.json in that folder, so it is no model of transformers; save one there with save_pr"):
        clip.resolve(settings(tmp_path), "teacher")
    save("sam", tmp_path, size={"longest_edge": 64}, do_pad=True, pad_size={"height": 64, "width": 64})
    with pytest.raises(ValueError, match="SamVisionModel takes images of 48 x 48 alone, and they are 64 x 64"):
        clip.resolve(settings(tmp_path), "teacher")
    save("clip", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["stray"] = weights.pop("pre_layrnorm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not the weights .*missing: visual.trunk.pre_layrnorm.weight; not of this model: stray"):
        clip.build(clip.resolve(settings(tmp_path), "teacher"), torch.device("cpu"))
    with pytest.raises(ValueError, match="has no text tower, and only a teacher can be without one; for a student"):
        clip.resolve(Student(model=f"transformers:{tmp_path}"), "student")


def test_a_repository_of_the_hub_is_read_from_its_copy_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--some--tower"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c0ffee")
    pooled, _ = expected("dinov2", save("dinov2", cached / "snapshots" / "c0ffee"), images(42))
    of_hub = clip.resolve(Teacher(model="transformers:some/tower"), "teacher")
    found = clip.build(of_hub, torch.device("cpu")).clip.eval().encode_image(images(42))  # type: ignore[operator]
    torch.testing.assert_close(found, pooled, rtol=0.0, atol=1e-5)
    with pytest.raises(ValueError, match=r"'transformers:some/other': no such folder, and the hub gave no config.json"):
        clip.resolve(Teacher(model="transformers:some/other"), "teacher")
    (cached / "snapshots" / "c0ffee" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the hub has no model.safetensors of it; convert its weights with save_pretrained"):
        clip.build(of_hub, torch.device("cpu"))
