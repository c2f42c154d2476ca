"""Masked views of images: what a tower sees of them, and what of it reaches the rest of the student."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.heads import Head
from megakd.models.masking import Masked
from megakd.models.student import Student
from megakd.training.accumulation import GradCache

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
B = 4


def _clip(**vision: Any) -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(16, vision_cfg=vision, text_cfg=TEXT)


def _pixels(size: int = 32) -> Tensor:
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(1)) + 3.0


def _tokens() -> Tensor:
    return torch.randint(1, 32, (B, 8), generator=torch.Generator().manual_seed(2))


def _student(clip: nn.Module, views: int = 1, ratio: float = 0.75) -> Student:
    heads: dict[str, Head] = {"feature": Head("none", 16, 16)}
    for place in range(views):
        heads[f"masked_feature{place or ''}"] = Head("none", 16, 16)
        heads[f"masked_feature{place or ''}"].view = Masked(ratio)
    return Student(clip, heads, 100.0)


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 4), (0.5, 8), (0.1, 14), (0.99, 1)])
def test_a_vits_masked_patches_are_left_out_as_in_mae(ratio: float, kept: int) -> None:
    """By the steps of CLIP-KD's `mask_forward`: positions are added, then patches chosen, then the class token put before them."""
    visual = _clip(**VIT).visual
    torch.manual_seed(7)
    with Masked(ratio).applied(visual, _pixels()) as pixels:
        found = visual(pixels)
    torch.manual_seed(7)
    seen_BK = torch.rand(B, 16).argsort(dim=1)[:, :kept]
    patches_BVC = visual.conv1(_pixels()).flatten(2).transpose(1, 2) + visual.positional_embedding[1:]
    patches_BKC = torch.stack([patches[seen] for patches, seen in zip(patches_BVC, seen_BK, strict=True)])
    class_B1C = (visual.class_embedding + visual.positional_embedding[0]).expand(B, 1, -1)
    blocks = visual.transformer(visual.ln_pre(torch.cat([class_B1C, patches_BKC], dim=1)))
    torch.testing.assert_close(found, visual.ln_post(blocks[:, 0]) @ visual.proj, rtol=1e-4, atol=1e-5)
    assert len({tuple(seen.tolist()) for seen in seen_BK}) > 1
    torch.testing.assert_close(visual(_pixels()), copy.deepcopy(visual)(_pixels()))  # nothing of the mask is left


def test_what_is_masked_gets_no_gradient_and_the_seen_patches_do() -> None:
    visual, pixels = _clip(**VIT).visual, _pixels().requires_grad_()
    with Masked(0.75).applied(visual, pixels) as masked:
        visual(masked).square().sum().backward()
    assert pixels.grad is not None
    moved_BV = F.max_pool2d(pixels.grad.abs().amax(1, keepdim=True), 8).flatten(1) > 0
    assert moved_BV.sum(1).tolist() == [4] * B


def test_another_tower_sees_the_mean_colour_in_squares_and_keeps_its_statistics() -> None:
    """A ResNet of 64 pixels: 16 squares of a quarter of its side."""
    visual = _clip(**RESNET).visual
    before = {name: value.clone() for name, value in visual.named_buffers()}
    with Masked(0.75).applied(visual, _pixels(64)) as masked:
        visual(masked)
    blank_BV = F.max_pool2d((masked == 0).all(1, keepdim=True).float(), 16).flatten(1)
    assert blank_BV.sum(1).tolist() == [12.0] * B
    whole_BHW = F.interpolate(blank_BV.reshape(B, 1, 4, 4), scale_factor=16)
    torch.testing.assert_close(masked, _pixels(64) * (1 - whole_BHW))
    assert all(torch.equal(value, before[name]) for name, value in visual.named_buffers())
    visual(_pixels(64))
    assert not torch.equal(visual.bn1.running_mean, before["bn1.running_mean"])


@pytest.mark.parametrize(("name", "size", "square"), [("vit_tiny_patch16_224", 48, 16), ("resnet18", 256, 32), ("resnet18", 96, 24)])
def test_a_timm_tower_is_masked_by_its_own_patches_or_by_squares(name: str, size: int, square: int) -> None:
    with torch.device("meta"):
        visual = _clip(image_size=size, timm_model_name=name, timm_pool="token" if "vit" in name else "avg", timm_proj="linear").visual
    with Masked(0.5).applied(visual, torch.ones(B, 3, size, size)) as masked:
        pass
    squares = F.avg_pool2d(masked, square)
    assert set(squares.unique().tolist()) == {0.0, 1.0}
    assert squares[0, 0].numel() == (size // square) ** 2


def test_an_image_of_one_patch_is_refused() -> None:
    visual = _clip(**VIT | {"patch_size": 32}).visual
    with (
        pytest.raises(ValueError, match=r"objectives\.masked_feature: .*a single patch"),
        Masked(0.75).applied(visual, _pixels()) as pixels,
    ):
        visual(pixels)


def test_a_masked_view_changes_its_own_output_alone_and_equal_ones_are_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = _clip(**VIT)
    plain = Student(clip, {"feature": Head("none", 16, 16)}, 100.0)(_pixels(), _tokens())
    calls: list[int] = []
    encode = clip.encode_image
    monkeypatch.setattr(clip, "encode_image", lambda pixels: (calls.append(1), encode(pixels))[1])
    torch.manual_seed(3)
    found = _student(clip, views=2)(_pixels(), _tokens())
    assert len(calls) == 2
    for name, value in plain.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(found["masked_feature.text"], found["text"])
    assert torch.equal(found["masked_feature.image"], found["masked_feature1.image"])
    assert not torch.allclose(found["masked_feature.image"], found["image"])
    torch.manual_seed(3)
    assert torch.equal(_student(clip)(_pixels(), _tokens())["masked_feature.image"], found["masked_feature.image"])
    assert not torch.equal(_student(clip)(_pixels(), _tokens())["masked_feature.image"], found["masked_feature.image"])


def test_micro_batches_have_the_gradient_of_one_graph_over_their_masked_images() -> None:
    """As `Trainer.step` does it: each micro-batch is seeded by its place in both of its forwards."""
    student, size = _student(_clip(**VIT)), B // 2
    target = F.normalize(torch.randn(B, 16, generator=torch.Generator().manual_seed(4)), dim=-1)

    def forward(number: int) -> dict[str, Tensor]:
        torch.manual_seed(100 + number)
        part = slice(number * size, (number + 1) * size)
        return student(_pixels()[part], _tokens()[part])  # type: ignore[no-any-return]

    def loss(outputs: dict[str, Tensor]) -> Tensor:
        return 2.5 * (outputs["masked_feature.image"] @ target.T * outputs["scale"]).logsumexp(1).mean()

    parts = [forward(number) for number in range(2)]
    loss({name: value if value.ndim == 0 else torch.cat([part[name] for part in parts]) for name, value in parts[0].items()}).backward()
    expected = {name: own.grad.clone() for name, own in student.named_parameters() if own.grad is not None}
    student.zero_grad()
    with torch.no_grad():
        cache = GradCache([forward(number) for number in range(2)])
    cache.backward(loss(cache.leaves))
    for number in range(2):
        cache.surrogate(forward(number), number).backward()
    assert "clip.visual.conv1.weight" in expected
    for name, own in student.named_parameters():
        if name in expected:
            torch.testing.assert_close(own.grad, expected[name], rtol=1e-5, atol=1e-7)
