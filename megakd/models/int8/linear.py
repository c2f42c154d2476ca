"""A linear layer whose matrix is int8 with a float32 scale a row. Legend: O outputs, I inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megakd.models.int8 import matmul


def quantise_weight(weight_OI: Tensor, product: matmul.Product | None = None) -> tuple[Tensor, Tensor]:
    """int8 (O, I) and float32 scale (O,) of a matrix, or of a convolution's (O, I, 1, 1): the only way that weights become int8.

    product: how it will be multiplied.
    """
    return matmul.quantise_rows(weight_OI.detach().flatten(1), matmul.levels_of(product))


# (layer, activations (..., I), rows of the matrix) -> (..., O)
StandIn = Callable[["Int8Linear", Tensor, slice], Tensor]


class Int8Linear(nn.Module):
    """x (..., I) -> (..., O) in x's type. `weight` is a parameter (O, I), `scale` a buffer (O,), `bias` the original's parameter.

    factor: None, or a buffer (I,) of powers of two by which the matrix was multiplied before it was rounded; activations are divided by
    it, which is exact. stand_in: computes in the layer's place inside `migration.Reference`.
    `module.to(dtype)` casts bias and factor; the scale stays float32.
    """

    weight: nn.Parameter
    scale: Tensor
    factor: Tensor | None
    stand_in: StandIn | None = None

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        threshold: float = 0.0,
        product: matmul.Product | None = None,
        migrated: bool = False,
    ) -> None:
        """weight: (O, I) of floating type, with values or on the meta device. threshold, product: see `matmul.linear`.

        migrated: whether there is a factor, of ones to begin with.
        """
        super().__init__()
        weight_OI, scale_O = quantise_weight(weight, product)
        self.out_features, self.in_features = weight_OI.shape
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        # A buffer: DeepSpeed rounds floating parameters to its own type when it partitions, and leaves buffers alone.
        self.register_buffer("scale", scale_O)
        # In no file, and so not in the state.
        self.register_buffer("factor", torch.ones(self.in_features, device=weight.device) if migrated else None, persistent=False)
        self.bias = bias
        self.threshold, self.product = threshold, product
        # open_clip reads the type of activations here, as the matrix no longer has it.
        self.int8_original_dtype = weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self._multiplied(x, slice(None))

    def third(self, x: Tensor, index: int) -> Tensor:
        """The product with the first, second or third part of a matrix of queries, keys and values."""
        size = self.out_features // 3
        return self._multiplied(x, slice(index * size, (index + 1) * size))

    def _multiplied(self, x: Tensor, rows: slice) -> Tensor:
        if self.stand_in is not None:
            return self.stand_in(self, x, rows)
        if self.factor is not None:
            x = x / self.factor.to(x.dtype)
        bias = None if self.bias is None else self.bias[rows]
        return matmul.linear(x, self.weight[rows], self.scale[rows], bias, self.threshold, self.product)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        scale_O = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != torch.float32:
            self.scale = scale_O.to(self.scale.device)
        self.int8_original_dtype = fn(torch.empty(0, dtype=self.int8_original_dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8PointwiseConv(Int8Linear):
    """Replaces a convolution of kernel 1: (N, I, height, width) -> (N, O, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
