"""open_clip's models in bf16, of every kind: native, timm, EVA, ResNets, with a text tower of transformers.

open_clip's own "bf16" converts a list of known layers: layer scales, pooling queries and transformers' text towers stay float32, and torch
refuses their sums and products with bf16. Of timm's models it casts everything, also the logit scale and rotary tables. Here parameters
become bf16 except those whose layer takes them in float32.

DeepSpeed's engine casts all parameters of a student itself; `for_engine` prepares the module for that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from open_clip.transformer import LayerNorm, LayerNormFp32
from torch import Tensor, nn

from megakd.runtime.precision import BatchNorm

SCALARS = ("logit_scale", "logit_bias")  # of a model, beside its towers


def to_bf16(clip: nn.Module) -> None:
    """Cast an open_clip model in place; works on the meta device. What stays float32:

    logit scale and bias, which multiply and shift every logit; the weights of open_clip's LayerNorm, which computes in float32 and casts
    its output back; batch norm, whose kernels take float32 weights with bf16 inputs and whose running statistics are sums; other buffers,
    such as rotary tables, unless bf16 holds them exactly (see `cast_exact_buffers`).
    """
    float32 = {id(getattr(clip, name)) for name in SCALARS if getattr(clip, name, None) is not None}
    for module in clip.modules():
        if type(module) is LayerNorm:
            module.__class__ = LayerNormFp32  # as open_clip builds a model that it will cast
        if isinstance(module, LayerNormFp32 | BatchNorm):
            float32 |= {id(parameter) for parameter in module.parameters(recurse=False)}
    for parameter in clip.parameters():
        if parameter.is_floating_point() and id(parameter) not in float32:
            parameter.data = parameter.data.to(torch.bfloat16)
    cast_exact_buffers(clip)


def cast_exact_buffers(module: nn.Module) -> None:
    """Cast to bf16, in place, the buffers that a constructor computed and bf16 holds exactly: attention masks, biases of zeros.

    They are added to bf16 values, where float32 would promote the sum (timm's Swin, EVA-01). On the meta device, without values, all of
    the constructor's.
    """
    for owner in module.modules():
        if isinstance(owner, BatchNorm):
            continue
        for key, buffer in computed_buffers(owner).items():
            if buffer.is_floating_point():
                narrow = buffer.to(torch.bfloat16)
                if buffer.is_meta or torch.equal(narrow.to(buffer.dtype), buffer):
                    setattr(owner, key, narrow)


def computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A module's own buffers that its constructor computes and no file of weights holds."""
    own = module.named_buffers(recurse=False, remove_duplicate=False)
    return {key: buffer for key, buffer in own if key in module._non_persistent_buffers_set}


def for_engine(module: nn.Module) -> None:
    """Prepare a module, in place, for an engine that rounds every parameter to bf16 and leaves buffers as they are.

    Batch norm then has bf16 weights beside float32 statistics, which torch accepts on a GPU and refuses on a CPU: on both it is made to
    read its weights in float32. Masks and zero biases become bf16, as in `to_bf16`.
    """
    for norm in module.modules():
        if isinstance(norm, BatchNorm):
            kind: Any = type(norm)
            norm.__class__ = _reading_float32(kind)
    cast_exact_buffers(module)


@functools.cache
def _reading_float32(kind: type[Any]) -> type[Any]:
    """A subclass of a batch norm, torch's or timm's, whose forward reads its weights in float32. The parameters keep their type."""

    def read(norm: nn.Module, name: str) -> Tensor | None:
        own = norm._parameters[name]
        return own if own is None or own.is_meta else own.float()

    return type(kind.__name__, (kind,), {"weight": property(lambda n: read(n, "weight")), "bias": property(lambda n: read(n, "bias"))})


def pixel_dtype(tower: nn.Module) -> torch.dtype:
    """Type of the pixels that a vision tower takes: that of its first convolution or matrix.

    Not of its first parameter: class embeddings, norms and positions of a bf16 tower may be float32.
    """
    for module in tower.modules():
        if (dtype := getattr(module, "int8_original_dtype", None)) is not None:
            return dtype  # type: ignore[no-any-return]
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.is_floating_point():
            return module.weight.dtype
    return next((own.dtype for own in tower.parameters() if own.is_floating_point()), torch.float32)
