"""Small students of the kinds that are exported: open_clip's ViT, timm's ViT, a ConvNeXt, SigLIP's towers; milliseconds each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from megakd import recipe
from megakd.models import clip
from support.decoders import CLIP, CPU

_TEXT: dict[str, Any] = CLIP["text_cfg"]  # type: ignore[assignment]
_TIMM = {"timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
TOWERS: dict[str, dict[str, Any]] = {
    "native": CLIP,
    "timm": {"embed_dim": 16, "vision_cfg": {"timm_model_name": "megakd_small_vit", **_TIMM}, "text_cfg": _TEXT},
    "convnext": {"embed_dim": 16, "vision_cfg": {"timm_model_name": "megakd_small_convnext", **_TIMM}, "text_cfg": _TEXT},
    "siglip": {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "megakd_small_siglip", "timm_pool": "map", "timm_proj": "none", "image_size": 32},
        "text_cfg": {**_TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
    },
}


def _vit(name: str, settings: dict[str, Any], **more: Any) -> nn.Module:
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
    built: nn.Module = build_model_with_cfg(VisionTransformer, name, settings.pop("pretrained", False), **{**shape, **more, **settings})
    return built


@register_model
def megakd_small_vit(**settings: Any) -> nn.Module:
    return _vit("megakd_small_vit", settings)


@register_model
def megakd_small_siglip(**settings: Any) -> nn.Module:
    """As SigLIP's: no class token, pooled by attention."""
    return _vit("megakd_small_siglip", settings, class_token=False, act_layer="gelu_tanh")


@register_model
def megakd_wide_vit(**settings: Any) -> nn.Module:
    """Of which megakd_small_vit may be a part."""
    return _vit("megakd_wide_vit", settings, embed_dim=48, depth=3, num_heads=3)


@register_model
def megakd_wide_siglip(**settings: Any) -> nn.Module:
    return _vit("megakd_wide_siglip", settings, embed_dim=48, depth=3, num_heads=3, class_token=False, act_layer="gelu_tanh")


@register_model
def megakd_small_convnext(**settings: Any) -> nn.Module:
    shape = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    built: nn.Module = build_model_with_cfg(
        ConvNeXt, "megakd_small_convnext", settings.pop("pretrained", False), feature_cfg={"flatten_sequential": True}, **shape, **settings
    )
    return built


def small_student(kind: str, tokenizer: Path) -> clip.ClipModel:
    """kind: of TOWERS. In evaluation mode."""
    torch.manual_seed(3)
    built = clip.build(clip.resolve(recipe.Student(architecture=TOWERS[kind], tokenizer=str(tokenizer)), "student"), CPU)
    built.clip.eval().requires_grad_(False)
    with torch.no_grad():  # a fresh model tells images apart by little
        for parameter in built.clip.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return built
