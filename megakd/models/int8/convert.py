"""Towers in 8 bits: attention, MLPs and their projections as int8 matrices with a float32 scale a row.

`quantise` converts a model in place, with values or on the meta device. `sources` then maps every tensor of the converted model to the
tensor of the original that it is made of, and `parts_of` makes it, so that a checkpoint can be read into the model tensor by tensor.

Embeddings, norms, patch convolutions and the projections to the joint space stay as they are. Legend: O outputs, I inputs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn

from megakd.models.int8 import attention, matmul
from megakd.models.int8.linear import Int8Linear, Int8PointwiseConv, quantise_weight

log = logging.getLogger("megakd.models")

LARGE = 1_000_000  # weights: a larger matrix that is not converted is named in the log
# Projections to the joint space, in open_clip's and timm's names: 0.1 % of a giant's parameters, whose error would be the embedding's.
JOINT = re.compile(r"(visual\.)?(proj|trunk\.head(\.fc)?|head\.(proj|mlp\.fc[12]))|(text\.)?(text_projection|proj(\.\d+)?)")
PATCHES = re.compile(r"(.*\.)?(patch_embed(ding)?s?|embeds|stem)(\..*)?|(visual\.)?conv1\.weight")
POSITIONS = re.compile(
    r"(.*\.)?(positional_embedding|position_embeddings|class_embedding|pos_embed\w*|cls_token|cls_emb|reg_token|register_tokens|mask_token"
    r"|latent|query|probe)"
)
Part = Literal["weight", "scale", "as it is"]


@dataclass(frozen=True)
class Source:
    """The tensor of the original's state that a tensor of a converted model is made of, and how."""

    tensor: str
    part: Part


def parts_of(original: Tensor, wanted: Iterable[Part], product: matmul.Product | None = None) -> dict[Part, Tensor]:
    """Of a tensor of the original: "weight" int8 (O, I), "scale" float32 (O,), "as it is" the tensor itself. It is quantised if wanted.

    product: as for `quantise`.
    """
    if set(wanted) == {"as it is"}:
        return {"as it is": original}
    weight_OI, scale_O = quantise_weight(original, product)
    return {"weight": weight_OI, "scale": scale_O, "as it is": original}


@dataclass(frozen=True)
class Report:
    """Numbers of parameters after a conversion. kept: matrices of at least a million weights that are neither int8 nor embeddings."""

    int8: int
    embeddings: int
    others: int
    kept: dict[str, int]

    @property
    def fraction(self) -> float:
        """The int8 share of the parameters that are not embeddings."""
        return self.int8 / max(1, self.int8 + self.others)


def quantise(
    module: nn.Module,
    *,
    threshold: float = 0.0,
    product: matmul.Product | None = None,
    migrated: bool = False,
) -> Report:
    """Replace the linear layers and attentions of a tower, or of a whole open_clip model, by int8 ones, in place. Works on meta.

    threshold: activations with a magnitude of at least this stay in 16 bits (see `matmul.linear`); 0 for none.
    product: how products are computed; by default each forward chooses for its device. migrated: layers have room for the factors of
    `migration`.
    Large matrices that are not converted are named in the log, unexpected ones as a warning.
    Raises ValueError for a negative threshold.
    """
    if threshold < 0:
        raise ValueError(f"outlier_threshold = {threshold}: a magnitude is at least 0; 0 quantises all activations, 6.0 is usual")
    _Conversion(module, threshold, product, migrated).convert(module, "")
    report = _report(module)
    for name, size in report.kept.items():
        expected = JOINT.fullmatch(name.removesuffix(".weight")) or PATCHES.fullmatch(name)
        log.log(logging.INFO if expected else logging.WARNING, "int8: %s stays in 16 bits (%.1f M parameters)", name, size / 1e6)
    return report


class _Conversion:
    """One walk over a model. A shared layer is converted once."""

    def __init__(self, root: nn.Module, threshold: float, product: matmul.Product | None, migrated: bool) -> None:
        self._settings = (threshold, product, migrated)
        self._tied = {id(module.weight) for module in root.modules() if isinstance(module, nn.Embedding)}
        self._done: dict[int, nn.Module] = {}

    def convert(self, parent: nn.Module, prefix: str) -> None:
        # Makes the attention of EVA, BEiT and Swin v2 call its layer and add the bias, instead of reading the matrix.
        if hasattr(parent, "qkv_bias_separate"):
            parent.qkv_bias_separate = True  # type: ignore[assignment]
        for key, child in list(parent._modules.items()):
            if child is None:
                continue
            name = f"{prefix}{key}"
            if id(child) not in self._done:
                self._done[id(child)] = child  # ends a cycle of modules
                self._done[id(child)] = self._converted(parent, child, name)
            parent._modules[key] = self._done[id(child)]

    def _converted(self, parent: nn.Module, child: nn.Module, name: str) -> nn.Module:
        if JOINT.fullmatch(name) or PATCHES.fullmatch(name):
            return child
        if (rebuilt := attention.rebuilt(child, self._linear)) is not None:
            return rebuilt.train(child.training)
        # These read matrices as tensors; TransformerEncoderLayer in its fused inference path.
        if isinstance(child, (nn.MultiheadAttention, attention.Attention, nn.TransformerEncoderLayer)):
            return child
        if type(child).forward in (nn.Linear.forward, TimmLinear.forward):
            if id(child.weight) in self._tied:
                return child
            return self._linear(child.weight, child.bias).train(child.training)  # type: ignore[arg-type]
        if _is_pointwise(child) and type(parent).__name__.endswith("Mlp"):
            return Int8PointwiseConv(child.weight, child.bias, *self._settings).train(child.training)  # type: ignore[arg-type]
        self.convert(child, f"{name}.")
        return child

    def _linear(self, weight: Tensor, bias: nn.Parameter | None) -> Int8Linear:
        return Int8Linear(weight, bias, *self._settings)


def _is_pointwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d and module.kernel_size == module.stride == (1, 1) and module.groups == 1 and module.padding in (0, (0, 0))
    )


def _report(module: nn.Module) -> Report:
    tables = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    counts = {"int8": 0, "embeddings": 0, "others": 0}
    kept = {}
    for name, parameter in module.named_parameters():
        embedding = id(parameter) in tables or POSITIONS.fullmatch(name) is not None
        kind = "int8" if parameter.dtype == torch.int8 else "embeddings" if embedding else "others"
        counts[kind] += parameter.numel()
        if kind == "others" and parameter.ndim > 1 and parameter.numel() >= LARGE:
            kept[name] = parameter.numel()
    return Report(**counts, kept=kept)


def sources(module: nn.Module) -> dict[str, Source]:
    """What each tensor in the state of a converted model is made of; a tensor that was not converted, of itself."""
    parts: dict[str, Part] = {}
    originals: dict[str, str] = {}
    named = [(f"{path}." if path else "", child) for path, child in module.named_modules(remove_duplicate=False)]
    for prefix, child in named:
        if isinstance(child, Int8Linear):
            parts |= {f"{prefix}weight": "weight", f"{prefix}scale": "scale"}
            originals[f"{prefix}scale"] = f"{prefix}weight"
    for prefix, child in named:
        originals |= {f"{prefix}{new}": f"{prefix}{old}" for new, old in getattr(child, "ORIGINALS", {}).items()}
    return {name: Source(originals.get(name, name), parts.get(name, "as it is")) for name in module.state_dict()}


def matrices(module: nn.Module) -> dict[Int8Linear, str]:
    """The int8 layers of a converted model, in its order, each with the name of the original's matrix that it is made of."""
    made_of = sources(module)
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, Int8Linear)}
    return {layer: made_of[f"{path}.weight" if path else "weight"].tensor for path, layer in layers.items()}
