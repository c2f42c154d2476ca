"""Teachers of every kind in bf16, as on a GPU: they take the pixels that they ask for, and keep in float32 what bf16 would spoil."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import LayerNormFp32
from safetensors.torch import save_file
from torch import Tensor, nn

from megakd.models import clip as clip_models
from megakd.models import streaming
from megakd.models.embeddings import Embeddings
from megakd.models.int8.convert import quantise
from megakd.runtime.launch import World
from megakd.runtime.precision import Precision
from megakd.teachers.replicated import ReplicatedTeacher
from support.teachers import KINDS, describe, inputs

CPU = torch.device("cpu")
NAMES = sorted(KINDS)


def _size(name: str) -> int:
    return int(KINDS[name]["vision_cfg"]["image_size"])


def _teacher(name: str, precision: Precision) -> ReplicatedTeacher:
    torch.manual_seed(3)
    return ReplicatedTeacher(clip_models.build(describe(name, "random"), CPU, precision))


def _embedded(name: str, teacher: ReplicatedTeacher) -> Embeddings:
    pixels, tokens = inputs(4, size=_size(name))
    return teacher.embed(pixels.to(teacher.dtype), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_in_bf16_embeds_pixels_of_its_own_type_as_the_one_in_float32_does(name: str) -> None:
    narrow, wide = _teacher(name, "bf16"), _teacher(name, "fp32")
    assert narrow.dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    found, true = _embedded(name, narrow), _embedded(name, wide)
    for ours, theirs in ((found.image, true.image), (found.text, true.text)):
        assert ours.dtype == torch.bfloat16
        assert torch.cosine_similarity(ours.float(), theirs).min() > 0.995


@pytest.mark.parametrize("name", NAMES)
def test_an_int8_teacher_in_bf16_embeds_pixels_of_its_own_type(name: str) -> None:
    built = clip_models.build(describe(name, "random"), CPU, "bf16")
    quantise(built.clip.eval())
    found = _embedded(name, ReplicatedTeacher(built))
    assert found.image.isfinite().all()
    assert found.text.isfinite().all()


@pytest.mark.parametrize("way", ["built", "streamed", "streamed int8"])
@pytest.mark.parametrize("name", ["timm ViT", "SigLIP", "ViT-bigG", "MobileCLIP"])
def test_scale_and_bias_of_a_teacher_in_bf16_are_those_of_its_file(name: str, way: str, tmp_path: Path) -> None:
    description = describe(name, "random")
    state: dict[str, Tensor] = clip_models.build(description, CPU).clip.state_dict()
    state["logit_scale"] = torch.tensor(math.log(112.34))  # bf16's nearest logarithm is that of 112.03
    if "logit_bias" in state:
        state["logit_bias"] = torch.tensor(-16.54)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "weights.safetensors")
    description = describe(name, str(tmp_path / "weights.safetensors"))
    if way == "built":
        built = clip_models.build(description, CPU, "bf16")
    else:
        built = streaming.load(description, World(0, 1, CPU), "bf16", int8=streaming.Int8() if way == "streamed int8" else None)
    found = _embedded(name, ReplicatedTeacher(built))
    assert float(found.scale) == pytest.approx(112.34, rel=1e-6)
    assert found.bias is None or float(found.bias) == pytest.approx(-16.54, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_norms_statistics_and_rotary_tables_stay_float32_and_matrices_do_not(name: str) -> None:
    clip: Any = clip_models.build(describe(name, "random"), CPU, "bf16").clip
    wide = clip_models.build(describe(name, "random"), CPU).clip
    for module in clip.modules():
        if isinstance(module, LayerNormFp32 | nn.modules.batchnorm._BatchNorm):
            assert all(tensor.dtype != torch.bfloat16 for tensor in module.state_dict().values())
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            assert module.weight.dtype == torch.bfloat16
    values = dict(wide.named_buffers())
    for key, buffer in clip.named_buffers():
        assert torch.equal(buffer.to(values[key].dtype), values[key]), f"{key} was rounded"


def test_a_random_coca_is_drawn_as_a_whole_and_the_same_each_time() -> None:
    """open_clip leaves a projection of its text decoder as the memory was; filled with NaN before, it shows."""
    found = []
    for filler in (float("nan"), 7.0):
        kept = [torch.full((size,), filler) for size in (1024, 1536, 2048, 2304, 4096) for _ in range(200)]
        del kept
        torch.manual_seed(5)
        found.append(clip_models.build(describe("CoCa", "random"), torch.device("cpu")).clip.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
