"""The softmax of a block's attention: that of the fused kernel, for every kind of tower and in 8 bit, with its gradient; nothing is kept
unasked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.heads import ModelShape
from megakd.models.image_only import ImageTower
from megakd.models.int8.convert import quantise
from megakd.models.patches import TowerReader, Weights, measure
from megakd.models.student import Student
from megakd.objectives.attention import AttentionHead
from megakd.objectives.base import ObjectiveHead
from megakd.planning.memory_tracker import MemoryTracker
from support import image_teachers  # noqa: F401  (registers the models)
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


class _Towers(nn.Module):
    """open_clip's model as `Student` holds it, without a line of it that reads blocks."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor, tokens: Tensor) -> list[Tensor]:
        clip: Any = self.clip
        return [F.normalize(part.float(), dim=-1) for part in (clip.encode_image(pixels), clip.encode_text(tokens))]


def _step(module: nn.Module, *given: Tensor) -> int:
    """Bytes at the peak of a training step's forward and backward."""
    with MemoryTracker("cpu") as watch:
        outputs = module(*given)
        rows = outputs if isinstance(outputs, list) else [value for value in outputs.values() if value.ndim > 1]
        torch.stack([part.sum() for part in rows]).sum().backward()
    return watch.peak


def test_where_no_objective_reads_a_block_there_is_no_hook_and_memory_is_that_of_the_plain_towers() -> None:
    pixels, tokens = inputs(16)
    head = AttentionHead([(LAST, LAST)], *(ModelShape(32, {LAST: measure(build("ViT-bigG").visual, LAST)}) for _ in range(2)))
    hooks, peaks = {}, {}
    for asked in (False, True):
        clip: Any = build("ViT-bigG").requires_grad_()
        student = Student(clip, {"attention": head} if asked else dict[str, ObjectiveHead](), 100.0)
        seen: list[int] = []
        clip.visual.ln_post.register_forward_pre_hook(
            lambda *ignored, clip=clip, seen=seen: seen.append(
                sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in clip.visual.modules())
            )
        )
        peaks[asked], hooks[asked] = _step(student, pixels, tokens), seen[0] - 1
    plain = _step(_Towers(build("ViT-bigG").requires_grad_()), pixels, tokens)
    assert (hooks[False], hooks[True]) == (0, 2)
    assert peaks[False] == pytest.approx(plain, rel=0.01)
    assert peaks[True] > peaks[False]
