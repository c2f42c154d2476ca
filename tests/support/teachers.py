"""Narrow versions of the giant teachers' architectures, with the same kinds of blocks: milliseconds each."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models import register_model
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from megakd.models import clip as clip_models
from megakd.recipe import Model

WORDS = 512
TEXT = {"context_length": 24, "vocab_size": WORDS, "width": 48, "heads": 3, "layers": 2}


def timm_tower(name: str, pool: str, proj: str | None, size: int = 48) -> dict[str, Any]:
    return {"image_size": size, "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool, "timm_proj": proj}


_NATIVE = {"image_size": 48, "patch_size": 16, "width": 48, "layers": 2, "head_width": 16}
# By the giant whose kind it is.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-bigG": {"embed_dim": 32, "vision_cfg": {**_NATIVE, "layers": 3}, "text_cfg": TEXT},
    "EVA02-E": {"embed_dim": 32, "vision_cfg": timm_tower("megakd_narrow_eva", "token", None), "text_cfg": TEXT, "custom_text": True},
    "PE-Core": {"embed_dim": 32, "vision_cfg": timm_tower("megakd_narrow_rotary", "map", None), "text_cfg": TEXT, "custom_text": True},
    "SigLIP": {
        "embed_dim": 48,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": timm_tower("megakd_narrow_siglip", "map", "none"),
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
    },
}

_POOLED = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 4}
# What else open_clip builds, each with layers or buffers of its own kind.
OTHERS: dict[str, dict[str, Any]] = {
    "ResNet": {"embed_dim": 32, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}, "text_cfg": TEXT},
    "ConvNeXt": {"embed_dim": 32, "vision_cfg": timm_tower("megakd_narrow_convnext", "avg", None), "text_cfg": TEXT},
    "timm ViT": {"embed_dim": 32, "vision_cfg": timm_tower("megakd_narrow_siglip", "avg", None), "text_cfg": TEXT},
    "Swin": {"embed_dim": 32, "vision_cfg": timm_tower("megakd_narrow_swin", "avg", None), "text_cfg": TEXT},
    "MobileCLIP": {"embed_dim": 32, "vision_cfg": timm_tower("megakd_narrow_fastvit", "avg", None), "text_cfg": TEXT, "custom_text": True},
    "layer scales": {
        "embed_dim": 32,
        "vision_cfg": {**_NATIVE, "ls_init_value": 0.1, "pos_embed_type": "sin_cos_2d"},
        "text_cfg": {**TEXT, "ls_init_value": 0.1, "embed_cls": True, "pad_id": 0},
        "custom_text": True,
    },
    "CoCa": {
        "embed_dim": 32,
        "vision_cfg": {**_NATIVE, **_POOLED, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 24, "vocab_size": WORDS, "width": 48, "heads": 3, "layers": 1},
        "custom_text": True,
    },
}
KINDS = ARCHITECTURES | OTHERS


@register_model
def megakd_narrow_convnext(pretrained: bool = False, **settings: Any) -> nn.Module:
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 32, 48), **known_settings(settings))


@register_model
def megakd_narrow_swin(pretrained: bool = False, **settings: Any) -> nn.Module:
    shape = {"img_size": 48, "patch_size": 4, "window_size": 3, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    return SwinTransformer(**shape, **known_settings(settings))


@register_model
def megakd_narrow_fastvit(pretrained: bool = False, **settings: Any) -> nn.Module:
    return FastVit(layers=(1, 1, 1, 1), embed_dims=(8, 16, 32, 64), mlp_ratios=(2, 2, 2, 2), **known_settings(settings))


@register_model
def megakd_narrow_eva(pretrained: bool = False, **settings: Any) -> nn.Module:
    return Eva(img_size=48, patch_size=16, embed_dim=48, depth=3, num_heads=3, use_post_norm=True, **known_settings(settings))


@register_model
def megakd_narrow_rotary(pretrained: bool = False, **settings: Any) -> nn.Module:
    shape = {"img_size": 48, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}
    rotary = {"use_rot_pos_emb": True, "use_abs_pos_emb": True, "attn_type": "rope", "qkv_bias": True, "init_values": 0.1}
    return Eva(**shape, **rotary, ref_feat_shape=(3, 3), **known_settings(settings))


@register_model
def megakd_narrow_siglip(pretrained: bool = False, **settings: Any) -> nn.Module:
    shape = {"img_size": 48, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return VisionTransformer(**shape, class_token=False, **known_settings(settings))


def known_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("num_classes", "global_pool") if key in settings}


def describe(name: str, pretrained: str) -> clip_models.ModelSpec:
    return described(KINDS[name], pretrained)


def described(architecture: dict[str, Any], pretrained: str) -> clip_models.ModelSpec:
    """Without a tokenizer: those of the giants have 50 to 250 thousand words, and the texts here are tokens already."""
    settings = Model(architecture=architecture, pretrained=pretrained)
    return clip_models.ModelSpec("teacher", settings, copy.deepcopy(architecture), {}, lambda texts: torch.zeros(len(texts), 1))


def build(name: str, seed: int = 5) -> nn.Module:
    """Random weights with norms and biases that are not 0 and 1, so that a mistake with them shows."""
    torch.manual_seed(seed)
    clip = clip_models.build(describe(name, "random"), torch.device("cpu")).clip.eval().requires_grad_(False)
    for parameter in clip.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


def inputs(rows: int, seed: int = 0, size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (rows, 3, size, size) and tokens (rows, 24) with an end of text, the largest number, somewhere."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, size, size, generator=generator)
    tokens = torch.randint(1, WORDS - 1, (rows, 24), generator=generator)
    ends = torch.randint(4, 24, (rows,), generator=generator)
    tokens[torch.arange(24) > ends[:, None]] = 0
    tokens[torch.arange(rows), ends] = WORDS - 1
    return pixels, tokens
