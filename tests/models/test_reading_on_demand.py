"""Where no objective reads a block of the student's tower nothing is kept for one: no hook, and the memory of the plain towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.heads import ModelShape, ObjectiveHead
from megakd.models.patches import Read, Weights, measure
from megakd.models.student import Student
from megakd.objectives.attention import AttentionHead
from megakd.planning.memory_tracker import MemoryTracker
from support.teachers import build, inputs


class _Towers(nn.Module):
    """open_clip's model as `Student` holds it, without a line that reads blocks."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        clip: Any = self.clip
        return {"image": F.normalize(clip.encode_image(pixels), dim=-1), "text": F.normalize(clip.encode_text(tokens), dim=-1)}


def _peak(module: nn.Module) -> int:
    """Bytes at the peak of a forward and a backward."""
    pixels, tokens = inputs(16)
    with MemoryTracker("cpu") as watch:
        rows = [value.sum() for value in module(pixels, tokens).values() if value.ndim > 1]
        torch.stack(rows).sum().backward()
    return watch.peak


@pytest.mark.parametrize(("read", "needed"), [(-1, 1), (Weights(-1), 2)])
def test_a_student_whose_blocks_nobody_reads_has_no_hook_and_the_memory_of_the_plain_towers(read: Read, needed: int) -> None:
    shape = ModelShape(32, {read: measure(build("ViT-bigG").visual, read)})
    hooks, peaks = {}, {}
    for asked in (False, True):
        clip: Any = build("ViT-bigG").requires_grad_()
        heads: dict[str, ObjectiveHead] = {"attention": AttentionHead([(read, read)], shape, shape)} if asked else {}
        seen: list[int] = []
        clip.visual.conv1.register_forward_pre_hook(
            lambda *ignored, blocks=clip.visual.transformer, seen=seen: seen.append(
                sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in blocks.modules())
            )
        )
        peaks[asked], hooks[asked] = _peak(Student(clip, heads, 100.0)), seen
    assert hooks == {False: [0], True: [needed]}
    assert peaks[False] == pytest.approx(_peak(_Towers(build("ViT-bigG").requires_grad_())), rel=0.01)
    assert peaks[True] > peaks[False]
