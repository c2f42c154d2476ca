"""Narrow timm models of the kinds that image-only teachers are, with timm's own descriptions of their weights: milliseconds each."""

from __future__ import annotations

from typing import Any

from timm.layers import SwiGLU
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.4, 0.3), "interpolation": "bilinear"}
_OF_IMAGES = {
    "num_classes": 0,
    "fixed_input_size": True,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "mean": (0.485, 0.456, 0.406),
}
_OF_IMAGES |= {"std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
default_cfgs = generate_default_cfgs({
    "megakd_tiny_dino.first": {**_OF_IMAGES, "input_size": (3, 42, 42), "hf_hub_id": "timm/"},
    "megakd_tiny_dinov3.first": {**_OF_IMAGES, "input_size": (3, 48, 48), "hf_hub_id": "timm/"},
    "megakd_tiny_eva.first": {**_OF_IMAGES, "input_size": (3, 48, 48), "hf_hub_id": "timm/"},
    "megakd_tiny_swin.first": {**_OF_IMAGES, "input_size": (3, 48, 48), "hf_hub_id": "timm/"},
    "megakd_tiny_sam.first": {**_OF_IMAGES, "input_size": (3, 48, 48), "hf_hub_id": "timm/"},
    "megakd_tiny_hiera.first": {**_OF_IMAGES, "input_size": (3, 64, 64), "hf_hub_id": "timm/"},
    # As timm's SigLIP: a name for each size, of one model.
    "megakd_sized_patch16_32": {**_OF_IMAGES, "input_size": (3, 32, 32)},
    "megakd_sized_patch16_64": {**_OF_IMAGES, "input_size": (3, 64, 64)},
    # As timm's classifiers: tags with a head, and with preprocessing of their own.
    "megakd_tiny_classifier.first": {**_OF_IMAGES, **HALVES, "num_classes": 7, "input_size": (3, 32, 32), "hf_hub_id": "timm/"},
    "megakd_tiny_classifier.second": {**_OF_IMAGES, "num_classes": 7, "input_size": (3, 32, 32), "hf_hub_id": "timm/", "custom_load": "hf"},
})  # fmt: skip
_SHAPE = {"embed_dim": 48, "depth": 3, "num_heads": 3}
_SIGLIP = {**_SHAPE, "patch_size": 16, "class_token": False}


def _built(kind: Any, name: str, settings: dict[str, Any], **shape: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(kind, name, settings.pop("pretrained", False), **shape, **settings)
    return model


@register_model
def megakd_tiny_dino(**settings: Any) -> nn.Module:
    """As DINOv2's giant: registers, layer scales, SwiGLU, patches of 14 pixels."""
    own = {"reg_tokens": 4, "init_values": 0.5, "no_embed_class": True, "mlp_layer": SwiGLU, "mlp_ratio": 2, "patch_size": 14}
    return _built(VisionTransformer, "megakd_tiny_dino", settings, **own, **_SHAPE)


@register_model
def megakd_sized_patch16_32(**settings: Any) -> nn.Module:
    return _built(VisionTransformer, "megakd_sized_patch16_32", {"global_pool": "map", **settings}, **_SIGLIP)


@register_model
def megakd_sized_patch16_64(**settings: Any) -> nn.Module:
    return _built(VisionTransformer, "megakd_sized_patch16_64", {"global_pool": "map", **settings}, **_SIGLIP)


@register_model
def megakd_tiny_dinov3(**settings: Any) -> nn.Module:
    """As DINOv3: rotary positions, registers."""
    own = {"patch_size": 16, "num_reg_tokens": 4, "use_rot_pos_emb": True, "use_abs_pos_emb": False, "init_values": 0.5, "qkv_bias": False}
    return _built(Eva, "megakd_tiny_dinov3", settings, **own, dynamic_img_size=True, rope_type="dinov3", use_fc_norm=False, **_SHAPE)


@register_model
def megakd_tiny_eva(**settings: Any) -> nn.Module:
    """As EVA02: rotary positions beside learned ones, whose grid is that of the first training."""
    own = {"patch_size": 16, "use_rot_pos_emb": True, "ref_feat_shape": (2, 2), "init_values": 0.5, "scale_mlp": True}
    return _built(Eva, "megakd_tiny_eva", settings, **own, **_SHAPE)


@register_model
def megakd_tiny_swin(**settings: Any) -> nn.Module:
    return _built(SwinTransformer, "megakd_tiny_swin", settings, window_size=3, embed_dim=16, depths=(2, 2), num_heads=(2, 2))


@register_model
def megakd_tiny_sam(**settings: Any) -> nn.Module:
    own = {"patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "use_rel_pos": True, "neck_chans": 24}
    return _built(VisionTransformerSAM, "megakd_tiny_sam", settings, **own, **_SHAPE)


@register_model
def megakd_tiny_classifier(**settings: Any) -> nn.Module:
    return _built(VisionTransformer, "megakd_tiny_classifier", settings, patch_size=16, **_SHAPE)


@register_model
def megakd_tiny_hiera(**settings: Any) -> nn.Module:
    """Of a class whose layers are not known in 8 bit."""
    return _built(Hiera, "megakd_tiny_hiera", settings, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1))
