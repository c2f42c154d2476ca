"""SmoothQuant for a teacher that is loaded already (arXiv 2211.10438): outliers of activations move into the weights.

One huge channel makes the step of its whole row of activations so coarse that the others vanish. A channel's factor, the root of its
largest activation over its largest weight, multiplies the column of the matrix and divides the activations:

1. `Reference`: some batches go through the teacher with its original matrices in 16 bits, read again from the file one at a time
   (`Originals`), while the largest activation of every channel is noted. The outputs are those of a 16-bit teacher, to compare with.
2. `migrate`: each matrix is read once more, multiplied by its factors and quantised.

Factors are powers of two: dividing activations by them is exact in every type, and the last bits of an activation, which another machine
may round differently, rarely change one. The first rank's factors count, so all ranks, however many, have the same teacher.
Legend: O outputs, I inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.int8.linear import Int8Linear, quantise_weight
from megakd.runtime import collectives
from megakd.runtime.launch import World

METHOD = "SmoothQuant, alpha 0.5, powers of two"
# Against the layer's median. A channel that was quiet in the sample may be loud later, so little is made louder; 60 times is common.
SMALLEST, LARGEST = -2, 12


class Readable(Protocol):
    def read(self, name: str) -> Tensor: ...


class Originals:
    """The matrices of which int8 layers were made, read one at a time: the whole model in 16 bits is never in memory.

    Every rank calls `read`, of the same layer; the first one alone reads.
    """

    def __init__(
        self, names: Mapping[Int8Linear, str], reopen: Callable[[], Readable], world: World, opened: Readable | None = None
    ) -> None:
        """names: of the layers' matrices in the weights that `reopen` gives; it is called on the first rank, and not before a read.

        opened: what it would give, where that exists already and is expensive to make again; `close` releases it.
        """
        self.names, self.world = dict(names), world
        self._reopen = reopen
        self._opened = opened

    def read(self, layer: Int8Linear) -> Tensor:
        """(O, I) in the file's type, on the device. Raises ValueError or OSError on every rank when it cannot be read."""
        weights: list[Tensor] = []

        def read_on_main() -> tuple[torch.dtype, tuple[int, ...]]:
            if self._opened is None:
                self._opened = self._reopen()
            weights.append(self._opened.read(self.names[layer]).flatten(1).contiguous())
            return weights[0].dtype, tuple(weights[0].shape)

        dtype, shape = collectives.by_main(read_on_main, self.world)
        weight_OI = weights[0].to(self.world.device) if weights else torch.empty(shape, dtype=dtype, device=self.world.device)
        if self.world.size > 1:
            dist.broadcast(weight_OI.view(-1).view(torch.uint8), 0)
        return weight_OI

    def close(self) -> None:
        """Release what was opened: random weights lie in memory."""
        self._opened = None


class Reference:
    """While it is entered, int8 layers multiply by their original matrices in the type of the activations, and note those if asked to.

    Every rank runs the same batches meanwhile. largest: of every layer that was called, each channel's largest magnitude (I,), float32.
    """

    def __init__(self, originals: Originals) -> None:
        self.largest: dict[Int8Linear, Tensor] = {}
        self.noting = False
        self._originals = originals
        self._last: tuple[Int8Linear, Tensor] | None = None

    def __enter__(self) -> Reference:
        for layer in self._originals.names:
            layer.stand_in = self._multiply
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for layer in self._originals.names:
            layer.stand_in = None
        self._last = None

    def _multiply(self, layer: Int8Linear, x: Tensor, rows: slice) -> Tensor:
        if self.noting:
            largest_I = x.abs().flatten(0, -2).amax(dim=0).float()
            self.largest[layer] = torch.maximum(self.largest[layer], largest_I) if layer in self.largest else largest_I
        if self._last is None or self._last[0] is not layer:  # queries, keys and values call for one matrix in turn
            self._last = (layer, self._originals.read(layer).to(x.dtype))
        bias = None if layer.bias is None else layer.bias[rows].to(x.dtype)
        return F.linear(x, self._last[1][rows], bias)


def migrate(originals: Originals, largest: dict[Int8Linear, Tensor], overwrite: Callable[[nn.Parameter, Tensor], object]) -> str:
    """Quantise every layer of `largest` anew with its factors. A collective. Returns a SHA-256 of all factors.

    overwrite: puts values into a parameter, which may be partitioned over the ranks.
    """
    digest = hashlib.sha256()
    for layer in originals.names:
        if layer not in largest:
            continue
        weight_OI = originals.read(layer).float()
        factor_I = factors(largest[layer], weight_OI.abs().amax(dim=0))
        if originals.world.size > 1:
            dist.broadcast(factor_I, 0)
        int8_OI, scale_O = quantise_weight(weight_OI * factor_I, layer.product)
        overwrite(layer.weight, int8_OI)
        layer.scale.copy_(scale_O)
        layer.factor = factor_I
        digest.update(factor_I.cpu().numpy().tobytes())
    return digest.hexdigest()


def factors(activation_I: Tensor, weight_I: Tensor) -> Tensor:
    """(I,) float32 powers of two from each channel's largest magnitudes; 1 where one of them is 0 or not finite."""
    exponent_I = (activation_I.log2() - weight_I.log2()) / 2
    finite_I = exponent_I.isfinite()
    if not finite_I.any():
        return torch.ones_like(exponent_I)
    exponent_I = (exponent_I - exponent_I[finite_I].median()).round().clamp(SMALLEST, LARGEST)
    return torch.exp2(torch.where(finite_I, exponent_I, 0.0))
