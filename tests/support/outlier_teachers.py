"""Teachers of the giants' kinds with outliers in their activations, wide and deep enough for an agreement to mean something: seconds each.

Their outliers change nothing of what they compute in float: see `megakd.benchmarks.outliers`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from megakd.benchmarks import outliers
from megakd.models import clip as clip_models
from megakd.recipe import Teacher
from support.teachers import known_settings, timm_tower

WIDTH, DEPTH, PIXELS, TOKENS, WORDS = 192, 4, 64, 16, 512
TEXT = {"context_length": TOKENS, "vocab_size": WORDS, "width": WIDTH, "heads": 4, "layers": DEPTH}


def _timm(name: str) -> dict[str, Any]:
    return {"embed_dim": 64, "vision_cfg": timm_tower(name, "token", None, PIXELS), "text_cfg": TEXT, "custom_text": True}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "open_clip's ViT": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": PIXELS, "patch_size": 16, "width": WIDTH, "layers": DEPTH, "head_width": 48},
        "text_cfg": TEXT,
    },
    "timm's ViT": _timm("megakd_outliers_vit"),
    "EVA": _timm("megakd_outliers_eva"),
    "EVA with norms at the end": _timm("megakd_outliers_eva_post"),
}
SHAPE: dict[str, Any] = {"img_size": PIXELS, "patch_size": 16, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4}


@register_model
def megakd_outliers_vit(pretrained: bool = False, **settings: Any) -> nn.Module:
    return VisionTransformer(**SHAPE, **known_settings(settings))


@register_model
def megakd_outliers_eva(pretrained: bool = False, **settings: Any) -> nn.Module:
    return Eva(**SHAPE, use_rot_pos_emb=True, ref_feat_shape=(4, 4), swiglu_mlp=True, **known_settings(settings))


@register_model
def megakd_outliers_eva_post(pretrained: bool = False, **settings: Any) -> nn.Module:
    return Eva(**SHAPE, use_post_norm=True, **known_settings(settings))


def description(name: str, pretrained: str, **settings: Any) -> clip_models.ModelSpec:
    """Of a teacher of the recipe; without a tokenizer, because texts here are tokens already."""
    found = Teacher(architecture=ARCHITECTURES[name], pretrained=pretrained, **settings)
    return clip_models.ModelSpec("teacher", found, copy.deepcopy(ARCHITECTURES[name]), {}, lambda texts: torch.zeros(len(texts), 1))


def build(name: str, *, grown: bool = True) -> nn.Module:
    """With outliers, or the same model without any."""
    torch.manual_seed(0)
    clip = clip_models.build(description(name, "random"), torch.device("cpu")).clip.eval().requires_grad_(False)
    if grown:
        assert outliers.add(clip) >= 2 * DEPTH
    return clip


def inputs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pixels with coarse structure, so that images differ, and tokens with an end of text."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(rows, 3, 8, 8, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    tokens = torch.randint(1, WORDS - 1, (rows, TOKENS), generator=generator)
    tokens[:, -1] = WORDS - 1
    return torch.randn(rows, 3, PIXELS, PIXELS, generator=generator) + 2 * coarse, tokens
