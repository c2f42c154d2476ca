"""The product of activations with an int8 matrix, and the one place that chooses how it is computed on which device.

Three ways, all with weights of 8 bits and a float32 scale a row:
- "dequantise": the matrix is widened to the activations' type, then an ordinary product. Activations keep their precision.
- "bitsandbytes": activations are quantised row by row, the product is of integers; bitsandbytes' kernels (LLM.int8, arXiv 2208.07339).
- "int_mm": the same with torch's own `_int_mm` and plain torch operations around it.

Legend: M rows of activations (batch x tokens), I inputs, O outputs, C columns with outliers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Literal["dequantise", "bitsandbytes", "int_mm"]

LEVELS = 127  # symmetric: -128 is not used


def choose(device: torch.device) -> Product:
    """The way that products are computed on a device, where nothing else is asked for.

    CPU, one thread of an AMD EPYC with AVX512-VNNI, torch 2.14.1, bitsandbytes 0.50.2, milliseconds, the best of 10 on a machine that
    was shared. Rows x inputs -> outputs of the MLPs of ViT-bigG-14, for 2 images of 257 tokens and for 64 texts of 77; "plain" is an
    unquantised layer of the same type:

    | shape, type                | plain | dequantise | bitsandbytes | int_mm |
    | 514 x 1664 -> 8192, fp32   | 349   | 502        | 59           | 47     |
    | 4928 x 1280 -> 5120, fp32  | 2068  | 2117       | 827          | 446    |
    | 514 x 1664 -> 8192, bf16   | 76    | 139        | 46           | 25     |
    | 4928 x 1280 -> 5120, bf16  | 298   | 343        | 585          | 449    |

    OMP_NUM_THREADS=1 python -m timeit -n 1 -r 5 -s "import torch; from megakd.models import int8_products as p;
    x = torch.randn(514, 1664); c, s = p.quantise_rows(torch.randn(8192, 1664))" "p.linear(x, c, s, None, 0.0, 'int_mm')"

    A teacher on a CPU runs in fp32, so int_mm it is; a threshold of 6 with no column above it costs at most 30 % more.
    Without VNNI torch's integer product is a scalar loop, so such a CPU dequantises. CUDA: not measured yet. bitsandbytes where it is
    installed, since the int8 tensor cores have twice the rate of bf16; `product` of `int8.quantise` asks for another way.
    """
    if device.type == "cuda" and bitsandbytes() is not None:
        return "bitsandbytes"
    if device.type == "cpu" and torch.cpu._is_vnni_supported():
        return "int_mm"
    return "dequantise"


def linear(
    x: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None, threshold: float = 0.0, product: Product | None = None
) -> Tensor:
    """x (..., I) times the transposed matrix plus bias: (..., O) in x's type.

    threshold: columns of activations with a magnitude of at least this are not quantised but multiplied in x's type; 0 quantises all.
    It has no effect on "dequantise", which quantises none. product: None takes `choose(x.device)`.
    """
    chosen = product or choose(x.device)
    x_MI = x.reshape(-1, x.shape[-1])
    if chosen == "dequantise" or not _takes_integers(x_MI, weight_OI):
        product_MO = F.linear(x_MI, _widened(weight_OI, scale_O, x.dtype))
    elif chosen == "bitsandbytes":
        product_MO = _bitsandbytes(x_MI, weight_OI, scale_O, threshold)
    else:
        product_MO = _int_mm(x_MI, weight_OI, scale_O, threshold)
    if bias_O is not None:
        product_MO = product_MO + bias_O.to(x.dtype)
    return product_MO.reshape(*x.shape[:-1], len(weight_OI))


def quantise_rows(values_MI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (M, I) and float32 scale (M,) with values ~ int8 * scale: a row's largest magnitude becomes 127. Zeros get scale 1.

    The error of an element is at most half of its row's scale, so 0.4 % of the row's largest. Works on the meta device.
    """
    scale_M = values_MI.abs().amax(dim=1).float() / LEVELS
    scale_M = torch.where(scale_M == 0, 1.0, scale_M)
    return (values_MI / scale_M[:, None]).round_().to(torch.int8), scale_M


@functools.cache
def bitsandbytes() -> ModuleType | None:
    """Imported at the first product that wants it (it takes seconds and looks for a GPU); None where it is not installed."""
    return importlib.import_module("bitsandbytes") if importlib.util.find_spec("bitsandbytes") is not None else None


def _takes_integers(x_MI: Tensor, weight_OI: Tensor) -> bool:
    """cuBLASLt multiplies integers from 17 rows up, with sizes that 8 divides."""
    if x_MI.device.type != "cuda":
        return x_MI.device.type != "meta" and len(x_MI) > 0
    return len(x_MI) > 16 and weight_OI.shape[0] % 8 == 0 and weight_OI.shape[1] % 8 == 0


def _widened(weight_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplied in float32 and rounded once: a scale rounded to bf16 would shift a whole row by up to 0.4 %."""
    if weight_OI.device.type == "cpu":
        # 2 to 6 times faster there than one operation of mixed types (31 ms instead of 197 for 8192 x 1664 in bf16), which has no temporary
        return weight_OI.float().mul_(scale_O[:, None]).to(dtype)
    return torch.mul(weight_OI, scale_O[:, None], out=torch.empty(weight_OI.shape, dtype=dtype, device=weight_OI.device))


def _bitsandbytes(x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor, threshold: float) -> Tensor:
    """On CUDA its kernels read and write float16: activations and products of a magnitude above 65504 become infinite."""
    library = bitsandbytes()
    if library is None:
        raise ValueError("product = 'bitsandbytes': not installed; `pip install bitsandbytes`, or ask for 'dequantise'")
    narrow_MI = x_MI.half() if x_MI.device.type == "cuda" else x_MI
    x8_MI, absmax_M, columns_C = library.functional.int8_vectorwise_quant(narrow_MI.contiguous(), threshold=threshold)
    integers_MO = library.functional.int8_linear_matmul(x8_MI, weight_OI)
    product_MO = torch.ops.bitsandbytes.int8_mm_dequant(integers_MO, absmax_M, scale_O * LEVELS, dtype=x_MI.dtype)
    return _with_columns(product_MO, x_MI, columns_C, weight_OI, scale_O)


def _int_mm(x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor, threshold: float) -> Tensor:
    columns_C = None
    regular_MI = x_MI
    if threshold > 0:
        outlier_MI = x_MI.abs() >= threshold
        columns_C = outlier_MI.any(dim=0).nonzero().flatten()
        regular_MI = x_MI.index_fill(1, columns_C, 0.0)
    x8_MI, x_scale_M = quantise_rows(regular_MI)
    product_MO = torch._int_mm(x8_MI, weight_OI.t()).float().mul_(x_scale_M[:, None]).mul_(scale_O)
    return _with_columns(product_MO.to(x_MI.dtype), x_MI, columns_C, weight_OI, scale_O)


def _with_columns(product_MO: Tensor, x_MI: Tensor, columns_C: Tensor | None, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Adds the product of the columns that were left out of the integers."""
    if columns_C is None or len(columns_C) == 0:
        return product_MO
    return product_MO + F.linear(x_MI[:, columns_C], _widened(weight_OI[:, columns_C], scale_O, x_MI.dtype))
