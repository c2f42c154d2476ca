"""The softmax of a block's attention: that of the fused kernel, for every kind of tower and in 8 bit, with its gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models import clip
from megakd.models.image_only import ImageTower
from megakd.models.int8.convert import quantise
from megakd.models.patches import TowerReader, Weights, measure
from megakd.recipe import Teacher
from megakd.runtime import launch
from megakd.teachers.build import load
from support import image_teachers, transformers_folders  # noqa: F401  (the former registers its models)
from support.teachers import build, inputs

WITH = ("ViT-bigG", "layer scales", "EVA02-E", "PE-Core", "SigLIP", "timm ViT")
WITHOUT = ("ResNet", "ConvNeXt", "Swin", "MobileCLIP")
LAST = Weights(-1)


def _read(visual: nn.Module, pixels: Tensor, *reads: Weights | int) -> dict[Weights | int, Tensor]:
    with TowerReader(visual, reads) as reader:
        embedded = visual(pixels)
    return reader.maps(embedded)


def _by_formula(visual: Any, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """(B, L, L) in float64, the heads' mean: from the queries and keys that the last block hands to the fused kernel."""
    seen: list[tuple[Tensor, Tensor]] = []
    kernel = F.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append((query, key))
        return kernel(query, key, value, *args, **options)

    blocks = visual.transformer.resblocks if hasattr(visual, "transformer") else visual.trunk.blocks
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", noted)
        handle = blocks[-1].register_forward_pre_hook(lambda *ignored: seen.clear())
        kept = blocks[-1].register_forward_hook(lambda *ignored: seen.append(seen[0]))
        visual(pixels.requires_grad_())  # without a gradient nn.MultiheadAttention goes another way
        handle.remove()
        kept.remove()
    query, key = (part.detach().double() for part in seen[0])
    return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1).mean(1)


@pytest.mark.parametrize("name", WITH)
def test_it_is_the_softmax_of_the_fused_kernels_queries_and_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    visual: Any = build(name).visual
    pixels = inputs(2)[0]
    softmax = _by_formula(visual, pixels.clone(), monkeypatch)
    trunk = getattr(visual, "trunk", None)
    prefix = 1 if trunk is None else trunk.num_prefix_tokens
    wanted = softmax[:, 0, 1:] if prefix else softmax.mean(1)
    with torch.no_grad():
        unread = visual(pixels)
        found = _read(visual, pixels, LAST)[LAST]
        read = visual(pixels)
    grid = measure(visual, LAST)
    assert (grid.count, grid.width, grid.grid) == (wanted.shape[1], 1, tuple(found.shape[1:3]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(1).double(), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(read, unread, rtol=1e-4, atol=1e-5)


def test_register_tokens_are_set_apart() -> None:
    """DINOv3's class token looks at its registers too, which are no places of the image."""
    visual: Any = ImageTower("megakd_tiny_dinov3", (32, 32)).eval()
    assert visual.trunk.num_prefix_tokens > 1
    with torch.no_grad():
        found = _read(visual, torch.randn(2, 3, 32, 32), LAST)[LAST]
    assert found.shape[1] * found.shape[2] == measure(visual, -1).count
    assert (found.flatten(1).sum(1) < 1 - 1e-4).all()


@pytest.mark.parametrize("name", WITHOUT)
def test_a_tower_without_it_is_refused_by_name_with_what_every_tower_has(name: str) -> None:
    visual: Any = build(name).visual
    with pytest.raises(ValueError, match=r"teacher: attention\.teacher_blocks = -1: a vision tower of class \w+.*attention\.map to 'activ"):
        measure(visual, LAST, "teacher: attention.teacher_blocks")


def test_custom_attention_of_open_clip_is_refused_by_name() -> None:
    visual: Any = build("ViT-bigG").visual
    visual.transformer.resblocks[-1].attn = nn.Identity()
    with pytest.raises(ValueError, match="with attention of class Identity"):
        measure(visual, LAST)


def test_a_teacher_of_transformers_is_refused_by_its_class(tmp_path: Path) -> None:
    transformers_folders.save("dinov2", tmp_path)
    visual: Any = clip.on_meta(clip.resolve(Teacher(model=f"transformers:{tmp_path}"), "teacher")).clip.visual
    with pytest.raises(ValueError, match=r"teacher_blocks = -1: a vision tower of class Dinov2Model has no softmax .* 'activation'"):
        measure(visual, LAST, "teacher: attention.teacher_blocks")


def test_a_teacher_averages_it_to_the_recipes_grid_as_it_does_patch_tokens() -> None:
    """From 3 x 3 patches to 2 x 2 cells: a patch on a border counts by its share, which is a half."""
    world = launch.start()
    teacher = load(clip.resolve(Teacher(model="timm:megakd_tiny_dinov3", pretrained="random", patch_grid=(2, 2)), "teacher"), world)
    _, features = teacher.see(pixels := torch.randn(2, 3, 48, 48), [LAST])
    launch.stop()
    with torch.no_grad():
        whole_Bhw = _read(teacher.towers.clip.visual, pixels, LAST)[LAST][..., 0]
    shares = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]) / 1.5
    assert whole_Bhw.shape == (2, 3, 3)
    torch.testing.assert_close(features["attention.-1"][..., 0], shares @ whole_Bhw @ shares.T)


@pytest.mark.parametrize("name", WITH)
def test_in_8_bit_it_is_nearly_the_same(name: str) -> None:
    clip: Any = build(name)
    pixels = inputs(2)[0]
    with torch.no_grad():
        found = _read(clip.visual, pixels, LAST)[LAST]
        quantise(clip)
        rounded = _read(clip.visual, pixels, LAST)[LAST]
        before = clip.visual(pixels)
    assert not torch.equal(rounded, found)
    torch.testing.assert_close(rounded, found, rtol=0.05, atol=0.0)
    again: Any = build(name)
    quantise(again)
    with torch.no_grad():
        torch.testing.assert_close(again.visual(pixels), before, rtol=1e-3, atol=1e-4)


def _gradients(name: str, recompute: bool) -> list[Tensor]:
    clip: Any = build(name).requires_grad_()
    clip.train()
    clip.visual.set_grad_checkpointing(recompute)
    seen = _read(clip.visual, inputs(2)[0], LAST, Weights(0))
    (seen[LAST].square().sum() + seen[Weights(0)].square().sum()).backward()
    return [parameter.grad for parameter in clip.visual.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", WITH)
def test_its_gradient_reaches_the_tower_and_is_the_same_where_blocks_are_recomputed(name: str) -> None:
    plain, recomputed = (_gradients(name, recompute) for recompute in (False, True))
    assert sum(one.abs().sum() for one in plain) > 0
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(other, one)
