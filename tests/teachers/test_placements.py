"""Every placement of `recipe/placements.py`: its modes, its own keys, and the embeddings that it gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megakd.models import streaming
from megakd.models.patches import TowerReader, Weights, feature_name
from megakd.recipe import Teacher
from megakd.recipe.placements import INT8, MODES, PLACEMENTS
from megakd.runtime import launch
from megakd.runtime.launch import World
from megakd.teachers.build import class_of, load
from support.teachers import build, describe, inputs


@pytest.fixture
def alone() -> Iterator[World]:
    yield launch.start()
    launch.stop()


@pytest.mark.parametrize("mode", MODES)
def test_a_teacher_gives_the_same_embeddings_wherever_its_weights_lie(mode: str, alone: World, tmp_path: Path) -> None:
    original = build("ViT-bigG")
    save_file({name: value.contiguous() for name, value in original.state_dict().items()}, tmp_path / "weights.safetensors")
    described = describe("ViT-bigG", str(tmp_path / "weights.safetensors"))
    settings = Teacher(architecture=described.settings.architecture, pretrained=described.settings.pretrained, mode=mode)
    teacher = load(replace(described, settings=settings), alone, streaming.Int8() if settings.int8 else None)
    assert isinstance(teacher, class_of(settings.placement))
    pixels, tokens = inputs(6)
    found = teacher.embed(pixels, tokens)
    expected = original.encode_image(pixels, normalize=True), original.encode_text(tokens, normalize=True)  # type: ignore[operator]
    for own, other in zip((found.image, found.text), expected, strict=True):
        torch.testing.assert_close(own, other, **({"rtol": 0.0, "atol": 0.02} if settings.int8 else {"rtol": 0.0, "atol": 1e-6}))
    assert found.scale == original.logit_scale.exp()  # type: ignore[operator]
    assert not any(tensor.requires_grad for tensor in found[:3])


@pytest.mark.parametrize("kind", ["ViT-bigG", "EVA02-E", "SigLIP", "ConvNeXt", "ResNet", "Swin"])
def test_blocks_are_read_alike_wherever_weights_lie(kind: str, alone: World, tmp_path: Path) -> None:
    """Patch tokens of two blocks, and the attention of the last one of those that have it."""
    original, reads = build(kind), (-2, -1, *((Weights(-1),) if kind in ("ViT-bigG", "EVA02-E", "SigLIP") else ()))
    save_file({name: value.contiguous() for name, value in original.state_dict().items()}, tmp_path / "weights.safetensors")
    described = describe(kind, str(tmp_path / "weights.safetensors"))
    pixels, _ = inputs(3, size=64 if kind == "ResNet" else 48)
    visual: Any = original.visual
    with torch.no_grad(), TowerReader(visual, reads) as reader:
        embedded = visual(pixels)
    expected = reader.maps(embedded)
    for mode in MODES:
        settings = Teacher(architecture=described.settings.architecture, pretrained=described.settings.pretrained, mode=mode)
        teacher = load(replace(described, settings=settings), alone, streaming.Int8() if settings.int8 else None)
        _, found = teacher.see(pixels, reads)
        assert teacher.see(pixels, ())[1] == {}
        for read, map_BhwC in expected.items():
            size = float(map_BhwC.abs().max())
            most = 0.05 if settings.int8 else 1e-5
            torch.testing.assert_close(found[feature_name(read)] / size, map_BhwC / size, rtol=0.0, atol=most, msg=f"{mode} {read}")


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, placement in PLACEMENTS.items() for key in placement.options])
def test_a_key_of_one_placement_is_refused_beside_another(name: str, key: str) -> None:
    value = {"offload": True, "ds_config": "some.json", "compile": True}[key]
    for mode in MODES:
        if key in PLACEMENTS[mode.removesuffix(INT8)].options:
            assert getattr(Teacher(model="ViT-B-32", mode=mode, **{key: value}), key) == value
            continue
        with pytest.raises(ValueError, match=f"{key} is for a teacher {PLACEMENTS[name].summary}: set mode to {name} or .* '{mode}'"):
            Teacher(model="ViT-B-32", mode=mode, **{key: value})


def test_an_unknown_mode_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="'replicated', 'replicated_int8', 'zero3'"):
        Teacher(model="ViT-B-32", mode="zero4")
