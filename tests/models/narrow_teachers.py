"""Narrow versions of the giant teachers' architectures, with the same kinds of blocks: milliseconds each."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from megakd.models import towers
from megakd.recipe import Model

WORDS = 512
TEXT = {"context_length": 24, "vocab_size": WORDS, "width": 48, "heads": 3, "layers": 2}


def _timm(name: str, pool: str, proj: str | None) -> dict[str, Any]:
    return {"image_size": 48, "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool, "timm_proj": proj}


# By the giant whose kind it is.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-bigG": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 48, "patch_size": 16, "width": 48, "layers": 3, "head_width": 16},
        "text_cfg": TEXT,
    },
    "EVA02-E": {"embed_dim": 32, "vision_cfg": _timm("megakd_narrow_eva", "token", None), "text_cfg": TEXT, "custom_text": True},
    "PE-Core": {"embed_dim": 32, "vision_cfg": _timm("megakd_narrow_rotary", "map", None), "text_cfg": TEXT, "custom_text": True},
    "SigLIP": {
        "embed_dim": 48,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": _timm("megakd_narrow_siglip", "map", "none"),
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
    },
}


@register_model
def megakd_narrow_eva(pretrained: bool = False, **settings: Any) -> nn.Module:
    return Eva(img_size=48, patch_size=16, embed_dim=48, depth=3, num_heads=3, use_post_norm=True, **_known(settings))


@register_model
def megakd_narrow_rotary(pretrained: bool = False, **settings: Any) -> nn.Module:
    shape = {"img_size": 48, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}
    rotary = {"use_rot_pos_emb": True, "use_abs_pos_emb": True, "attn_type": "rope", "qkv_bias": True, "init_values": 0.1}
    return Eva(**shape, **rotary, ref_feat_shape=(3, 3), **_known(settings))


@register_model
def megakd_narrow_siglip(pretrained: bool = False, **settings: Any) -> nn.Module:
    shape = {"img_size": 48, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return VisionTransformer(**shape, class_token=False, **_known(settings))


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("num_classes", "global_pool") if key in settings}


def describe(name: str, pretrained: str) -> towers.Description:
    return described(ARCHITECTURES[name], pretrained)


def described(architecture: dict[str, Any], pretrained: str) -> towers.Description:
    """Without a tokenizer: those of the giants have 50 to 250 thousand words, and the texts here are tokens already."""
    settings = Model(architecture=architecture, pretrained=pretrained)
    return towers.Description("teacher", settings, copy.deepcopy(architecture), {}, lambda texts: torch.zeros(len(texts), 1))


def build(name: str, seed: int = 5) -> nn.Module:
    """Random weights with norms and biases that are not 0 and 1, so that a mistake with them shows."""
    torch.manual_seed(seed)
    clip = towers.build(describe(name, "random"), torch.device("cpu")).clip.eval().requires_grad_(False)
    for parameter in clip.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


def inputs(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (rows, 3, 48, 48) and tokens (rows, 24) with an end of text, the largest number, somewhere."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, 48, 48, generator=generator)
    tokens = torch.randint(1, WORDS - 1, (rows, 24), generator=generator)
    ends = torch.randint(4, 24, (rows,), generator=generator)
    tokens[torch.arange(24) > ends[:, None]] = 0
    tokens[torch.arange(rows), ends] = WORDS - 1
    return pixels, tokens
