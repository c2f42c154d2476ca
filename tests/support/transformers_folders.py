"""Narrow vision towers of transformers, saved by its own classes with what a processor says beside them: milliseconds each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

USUAL = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "do_normalize": True, "do_rescale": True}
_SHAPE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
_WINDOWS = {"window_size": 2, "global_attn_indexes": [1]}
_TOWERS = {
    "siglip": {**_SHAPE, "intermediate_size": 96, "image_size": 32, "patch_size": 8},
    "clip": {**_SHAPE, "intermediate_size": 96, "image_size": 32, "patch_size": 8},
    "sam": {**_SHAPE, "mlp_dim": 96, "output_channels": 24, "image_size": 48, "patch_size": 16, **_WINDOWS},
}
_DINO = {**_SHAPE, "mlp_ratio": 2, "patch_size": 14}
# kind: transformers' class, its configuration, the pixels that its processor gives it, tokens before the patches
KINDS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "dinov2": ("Dinov2", {**_DINO, "image_size": 42, "use_swiglu_ffn": True}, 42, 1),
    "dinov2_resized": ("Dinov2", {**_DINO, "image_size": 56}, 42, 1),  # as the hub's: 518 in the configuration, 224 in the processor's
    "registers": ("Dinov2WithRegisters", {**_DINO, "image_size": 42, "num_register_tokens": 4}, 42, 5),
    "dinov3": ("DINOv3ViT", {**_SHAPE, "intermediate_size": 96, "image_size": 48, "patch_size": 16, "num_register_tokens": 4}, 48, 5),
    "siglip": ("SiglipVision", _TOWERS["siglip"], 32, 0),
    "siglip_headless": ("SiglipVision", {**_TOWERS["siglip"], "vision_use_head": False}, 32, 0),
    "siglip_resized": ("SiglipVision", _TOWERS["siglip"], 48, 0),
    "clip": ("CLIPVision", _TOWERS["clip"], 32, 1),
    "clip_resized": ("CLIPVision", _TOWERS["clip"], 40, 1),
    "sam": ("SamVision", _TOWERS["sam"], 48, 0),
    "internvl": ("InternVLVision", {**_SHAPE, "intermediate_size": 96, "image_size": [28, 28], "patch_size": [14, 14]}, 28, 1),
}  # fmt: skip


def processor(pixels: int, **more: Any) -> dict[str, Any]:
    return {**USUAL, "do_resize": True, "size": {"height": pixels, "width": pixels}, "rescale_factor": 1 / 255, **more}


def save(kind: str, folder: Path, **more: Any) -> nn.Module:
    """transformers' own model, in evaluation mode, whose norms and biases are not 1 and 0. more: of the processor's file."""
    name, config, size, _ = KINDS[kind]
    torch.manual_seed(3)
    model: Any = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config)).eval().requires_grad_(False)
    return saved(model, folder, processor(size, **more))


def save_whole(kind: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A model that has such a tower, and the tower."""
    torch.manual_seed(3)
    texts = {"text_config": {**_SHAPE, "intermediate_size": 96, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}}
    name = {"clip": "CLIP", "siglip": "Siglip", "sam": "Sam"}[kind]
    config = getattr(transformers, f"{name}Config")(vision_config=_TOWERS[kind], **(texts if kind != "sam" else {}))
    whole: Any = getattr(transformers, f"{name}Model")(config).eval().requires_grad_(False)
    saved(whole, folder, processor(48 if kind == "sam" else 32))
    return whole, whole.vision_encoder if kind == "sam" else whole.vision_model


def saved(model: Any, folder: Path, beside: dict[str, Any]) -> nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "rel_pos" in name or "position_embeddings" in name or name.endswith("pos_embed"):
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(beside))
    return model  # type: ignore[no-any-return]


def expected(kind: str, model: Any, pixels: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """(B, D) and (B, h, w, C) of each block, from the classes' own outputs."""
    _, _, _, prefix = KINDS[kind]
    seen: list[Tensor] = []
    layers = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    handles = [layer.register_forward_hook(lambda _, __, output: seen.append(output)) for layer in layers]
    found = model(pixels, **({"interpolate_pos_encoding": True} if kind in ("siglip_resized", "clip_resized") else {}))
    for handle in handles:
        handle.remove()
    if kind == "sam":
        return found.last_hidden_state.mean((2, 3)), dict(enumerate(seen))
    side = int((seen[0].shape[1] - prefix) ** 0.5)
    maps = {place: each[:, prefix:].unflatten(1, (side, side)) for place, each in enumerate(seen)}
    if kind == "siglip_headless":
        return found.last_hidden_state.mean(1), maps
    return (found.last_hidden_state[:, 0] if kind == "internvl" else found.pooler_output), maps
