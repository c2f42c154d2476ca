"""Rebuilt attention against the original with the widened int8 matrices as its weights: the same numbers but for rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import Attention, AttentionalPooler
from timm.layers import AttentionPoolLatent
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn

from megakd.models.int8.convert import quantise, quantise_weight

WIDTH, HEADS, ROWS, QUERIES, KEYS = 24, 3, 4, 5, 7


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pair(original: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The original with its matrices rounded to 8 bits, and its conversion."""
    original = nn.ModuleDict({"layer": original.eval().requires_grad_(False)})
    for index, parameter in enumerate(original.parameters()):
        parameter.copy_(0.3 * _random(*parameter.shape, seed=index) + (1.0 if parameter.ndim == 1 else 0.0))
        if parameter.ndim == 2:
            codes, scale = quantise_weight(parameter)
            parameter.copy_(codes * scale[:, None])
    converted = copy.deepcopy(original)
    report = quantise(converted, product="dequantise")
    assert report.int8 > 0
    return original["layer"], converted["layer"]


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def _masks(length: int, keys: int) -> dict[str, Tensor | None]:
    shut = torch.ones(length, keys, dtype=torch.bool).triu(2)
    return {
        "none": None,
        "causal, added": torch.zeros(length, keys).masked_fill(shut, float("-inf")),
        "causal, boolean": shut,
        "each head its own": _random(ROWS * HEADS, length, keys, seed=9),
    }


@pytest.mark.parametrize("mask", _masks(QUERIES, KEYS))
@pytest.mark.parametrize("padding", ["none", "boolean", "added"])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention_across_two_sequences_is_unchanged(mask: str, padding: str, bias: bool) -> None:
    original, converted = _pair(nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True))
    query, key, value = _random(ROWS, QUERIES, WIDTH), _random(ROWS, KEYS, WIDTH, seed=1), _random(ROWS, KEYS, WIDTH, seed=2)
    padded = torch.arange(KEYS)[None] >= torch.tensor([7, 4, 5, 6])[:, None]
    paddings = {"none": None, "boolean": padded, "added": torch.zeros(ROWS, KEYS).masked_fill(padded, float("-inf"))}
    options: dict[str, Any] = {"attn_mask": _masks(QUERIES, KEYS)[mask], "key_padding_mask": paddings[padding], "need_weights": False}
    _same(converted(query, key, value, **options)[0], original(query, key, value, **options)[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", _masks(QUERIES, QUERIES))
def test_multihead_self_attention_is_unchanged(mask: str, batch_first: bool) -> None:
    original, converted = _pair(nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first))
    x = _random(ROWS, QUERIES, WIDTH)
    x = x if batch_first else x.transpose(0, 1)
    options = {"attn_mask": _masks(QUERIES, QUERIES)[mask], "need_weights": False}
    _same(converted(x, x, x, **options)[0], original(x, x, x, **options)[0])


@pytest.mark.parametrize("mask", _masks(QUERIES, QUERIES))
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_heads": True, "inner_norm": True}, {"qkv_bias": False}], ids=str)
def test_open_clips_own_attention_is_unchanged(options: dict[str, bool], mask: str) -> None:
    original, converted = _pair(Attention(WIDTH, HEADS, **options))
    x = _random(ROWS, QUERIES, WIDTH)
    wanted = _masks(QUERIES, QUERIES)[mask]
    _same(converted(x, attn_mask=wanted), original(x, attn_mask=wanted))


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias_separate": True}, {"qkv_bias": False}, {"qkv_fused": False}, {"scale_norm": True, "norm_layer": nn.LayerNorm}],
    ids=str,
)
def test_evas_attention_is_unchanged_however_it_adds_its_bias(options: dict[str, Any]) -> None:
    original, converted = _pair(EvaAttention(WIDTH, HEADS, **{"scale_norm": False, **options}))
    x = _random(ROWS, QUERIES, WIDTH)
    rope = _random(QUERIES - 1, 2 * WIDTH // HEADS)
    _same(converted(x, rope=rope), original(x, rope=rope))


OF_ONE_INPUT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "open_clip's pooler, keys of another width": (lambda: AttentionalPooler(WIDTH, 32, HEADS, n_queries=6), (KEYS, 32)),
    "timm's, a bias": (lambda: TimmAttention(WIDTH, HEADS, qkv_bias=True), (QUERIES, WIDTH)),
    "timm's, norms": (lambda: TimmAttention(WIDTH, HEADS, qk_norm=True, norm_layer=nn.LayerNorm), (QUERIES, WIDTH)),
    "timm's pool": (lambda: AttentionPoolLatent(WIDTH, num_heads=HEADS, mlp_ratio=2.0, norm_layer=nn.LayerNorm), (KEYS, WIDTH)),
    "the pool of a ResNet": (lambda: AttentionPool2d(3, WIDTH, HEADS, output_dim=10), (WIDTH, 3, 3)),
}


@pytest.mark.parametrize("kind", OF_ONE_INPUT)
def test_attention_over_one_input_is_unchanged(kind: str) -> None:
    make, shape = OF_ONE_INPUT[kind]
    original, converted = _pair(make())
    x = _random(ROWS, *shape)
    _same(converted(x), original(x))


def test_the_fused_inference_path_of_an_encoder_layer_keeps_its_matrices() -> None:
    """It reads them without calling its layers, so int8 ones would not be seen as such."""
    tower = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True)).eval()
    assert quantise(tower).int8 == 0
    with torch.no_grad():
        assert tower(_random(ROWS, QUERIES, WIDTH)).isfinite().all()
