"""open_clip's models in bf16, of every kind: native, timm, EVA, ResNets, with a text tower of transformers.

open_clip's own "bf16" converts a list of layers that it knows; layer scales, pooling queries and the text towers of transformers stay
behind and meet bf16 in sums and products that torch refuses. For timm's models it rounds everything, the logit scale and rotary tables
too. Here, as a rule without names of models: parameters are bf16 but for those whose layer takes them in float32.
"""

from __future__ import annotations

import torch
from open_clip.transformer import LayerNorm, LayerNormFp32
from torch import nn

from megakd.models.student import SCALARS


def to_bf16(clip: nn.Module) -> None:
    """Cast an open_clip model in place; works on the meta device. What stays float32:

    logit scale and bias, which multiply and shift every logit; the weights of open_clip's LayerNorm, which computes in float32 and casts
    its output back; batch norm, whose kernels take float32 weights with bf16 inputs and whose running statistics are sums; other buffers,
    such as rotary tables, unless bf16 holds them exactly (see `cast_exact_buffers`).
    """
    whole = {id(getattr(clip, name)) for name in SCALARS if getattr(clip, name, None) is not None}
    for module in clip.modules():
        if type(module) is LayerNorm:
            module.__class__ = LayerNormFp32  # what open_clip builds a model with that it means to cast
        if isinstance(module, LayerNormFp32 | nn.modules.batchnorm._BatchNorm):
            whole |= {id(parameter) for parameter in module.parameters(recurse=False)}
    for parameter in clip.parameters():
        if parameter.is_floating_point() and id(parameter) not in whole:
            parameter.data = parameter.data.to(torch.bfloat16)
    cast_exact_buffers(clip)


def cast_exact_buffers(module: nn.Module) -> None:
    """Cast to bf16, in place, the buffers that a constructor made and bf16 holds exactly: attention masks, biases of zeros.

    They are added to bf16 values, where float32 would widen the sum (timm's Swin, EVA-01). On the meta device, where no values are seen,
    all of the constructor's.
    """
    for owner in module.modules():
        if isinstance(owner, nn.modules.batchnorm._BatchNorm):
            continue
        for key in owner._non_persistent_buffers_set:
            buffer = owner._buffers.get(key)
            if buffer is None or not buffer.is_floating_point():
                continue
            narrow = buffer.to(torch.bfloat16)
            if buffer.is_meta or torch.equal(narrow.to(buffer.dtype), buffer):
                owner._buffers[key] = narrow
