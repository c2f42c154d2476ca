"""Patch tokens of every kind of tower: the right block's output, in the right places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from megakd.models import clip
from megakd.models.patches import blocks, measure, patch_tokens
from megakd.recipe import Student
from support.decoders import CLIP, CPU

TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": CLIP["vision_cfg"],
    "vit_wide": {**CLIP["vision_cfg"], "image_size": [32, 64]},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "timm_vit": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"},
    "timm_convnext": {"image_size": 64, "timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear"},
    "timm_swin": {"image_size": 224, "timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "avg", "timm_proj": "linear"},
}
LAST = {"vit": (4, 4), "vit_wide": (4, 8), "resnet": (2, 2), "timm_vit": (14, 14), "timm_convnext": (2, 2), "timm_swin": (7, 7)}


def _visual(name: str) -> nn.Module:
    torch.manual_seed(0)
    architecture = {"embed_dim": 16, "vision_cfg": TOWERS[name], "text_cfg": TEXT}
    visual: nn.Module = clip.build(clip.resolve(Student(architecture=architecture), "student"), CPU).clip.visual  # type: ignore[assignment]
    return visual.eval()


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, _visual(request.param)


def _images(visual: Any, count: int) -> torch.Tensor:
    size = visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def test_patch_tokens_are_those_of_open_clips_own_intermediates(tower: tuple[str, nn.Module]) -> None:
    """open_clip selects by the index of the block too, and drops class tokens of its own."""
    name, visual = tower
    found = patch_tokens(visual, _images(visual, 2), -1)
    own: Any = visual
    images = _images(visual, 2)
    expected = own.forward_intermediates(images, indices=1, normalize_intermediates=False, intermediates_only=True, output_fmt="NCHW")
    torch.testing.assert_close(found, expected["image_intermediates"][-1].flatten(2).transpose(1, 2), msg=name)


def test_the_grid_and_the_width_are_measured(tower: tuple[str, nn.Module]) -> None:
    name, visual = tower
    measured, tokens = measure(visual, -1), patch_tokens(visual, _images(visual, 1), -1)
    assert (measured.grid, measured.count, measured.width) == (LAST[name], *tokens.shape[1:])


def test_the_layer_counts_from_the_end_and_all_blocks_can_be_read() -> None:
    visual = _visual("vit")
    images = _images(visual, 1)
    assert torch.equal(patch_tokens(visual, images, -3), patch_tokens(visual, images, 0))
    assert not torch.equal(patch_tokens(visual, images, -2), patch_tokens(visual, images, -1))


def test_the_gradient_of_a_block_that_is_recomputed_is_the_same() -> None:
    visual: Any = _visual("vit")
    images, grads = _images(visual, 2), []
    for recompute in (False, True):
        visual.set_grad_checkpointing(recompute)
        visual.zero_grad()
        patch_tokens(visual, images, -2).square().sum().backward()
        grads.append(visual.conv1.weight.grad.clone())
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[1], grads[0])


def test_measuring_leaves_batch_norms_statistics_and_the_mode_alone() -> None:
    visual: Any = _visual("resnet").train()
    before = visual.bn1.running_mean.clone()
    measure(visual, -1)
    assert torch.equal(visual.bn1.running_mean, before)
    assert visual.training


def test_an_image_of_the_wrong_size_is_refused_with_the_towers_own() -> None:
    with pytest.raises(ValueError, match="images of 48 x 48 pixels: the vision tower takes 32 x 32"):
        patch_tokens(_visual("vit"), torch.zeros(1, 3, 48, 48), -1)


@pytest.mark.parametrize(
    ("make", "layer", "said"),
    [
        (lambda: _visual("vit"), -4, r"decoder\.layer = -4: the vision tower has 3 blocks"),
        (lambda: nn.Linear(1, 1), -1, "class Linear has no blocks"),
        (lambda: open_clip.create_model("ViT-B-32", device="meta", force_patch_dropout=0.5).visual, -1, "patch_dropout"),
    ],
    ids=["no such layer", "no blocks", "patch dropout"],
)
def test_a_tower_or_layer_that_gives_no_patches_is_refused(make: Callable[[], nn.Module], layer: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        blocks(make(), layer)
