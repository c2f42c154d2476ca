"""The product of activations with an int8 matrix, and the choice of how it is computed on which device.

Four ways, all with int8 weights and a float32 scale a row, `quantise_rows` to `levels_of` the way:
- "dequantise": the matrix is cast to the activations' type for an ordinary product. Activations keep their precision.
- "bitsandbytes": activations are quantised row by row, the product is of integers; bitsandbytes' kernels (LLM.int8, arXiv 2208.07339).
- "int_mm": the same with torch's own `_int_mm` and plain torch operations around it.
- "onednn": the same on an x86 CPU by the quantised product that torch compiles models in 8 bit to. Without VNNI its instruction adds two
  products in 16 bits and cuts the sum off, so its weights are rounded to 64 levels, where that cannot happen: 255 * 64 * 2 < 2^15.

A row's result does not depend on the rest of the batch: each row has its own scale, and outliers are elements, not columns of the batch.
Infinite and NaN activations make their row not finite in all of them.

Legend: M rows of activations (batch x tokens), I inputs, O outputs, C columns with outliers. A chunk: rows that are multiplied at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Literal["dequantise", "bitsandbytes", "int_mm", "onednn"]

LEVELS = 127  # symmetric: -128 is not used
ONEDNN_LEVELS = 64
# Of a chunk's integer product: its 32 bits and the float32 beside them would take several times the memory of the product in x's type.
CHUNK_ELEMENTS = 1 << 25
ZERO = 128  # of activations as unsigned integers
FEWEST_ROWS = 32  # cuBLASLt multiplies integers from 17 rows up; fewer are padded with zeros


def choose(device: torch.device) -> Product:
    """How products are computed on a device by default.

    CPU, one thread of an AMD EPYC with AVX512-VNNI, torch 2.14.1, bitsandbytes 0.50.2, milliseconds, the best of 10 on a machine that
    was shared. Rows x inputs -> outputs of the MLPs of ViT-bigG-14, for 2 images of 257 tokens and for 64 texts of 77; "plain" is an
    unquantised layer of the same type:

    | shape, type                | plain | dequantise | bitsandbytes | int_mm |
    | 514 x 1664 -> 8192, fp32   | 349   | 502        | 59           | 47     |
    | 4928 x 1280 -> 5120, fp32  | 2068  | 2117       | 827          | 446    |
    | 514 x 1664 -> 8192, bf16   | 76    | 139        | 46           | 25     |
    | 4928 x 1280 -> 5120, bf16  | 298   | 343        | 585          | 449    |

    OMP_NUM_THREADS=1 python -m timeit -n 1 -r 5 -s "import torch; from megakd.models.int8 import matmul as p;
    x = torch.randn(514, 1664); c, s = p.quantise_rows(torch.randn(8192, 1664))" "p.linear(x, c, s, None, 0.0, 'int_mm')"

    A teacher on a CPU runs in fp32, hence int_mm; a threshold of 6 with no column above it costs at most 30 % more. Without VNNI torch's
    integer product is a scalar loop, so such a CPU dequantises. There "onednn" is 1.8 times as fast as float32 (1600 x 768 -> 3072 on an
    AMD EPYC with AVX2: 57 ms of processor time, plain 103, int_mm 3,000), and never chosen by itself, as it drops a bit of the weights.
    CUDA is not measured yet: bitsandbytes where it is installed, since int8 tensor cores have twice the rate of bf16.
    """
    if device.type == "cuda" and bitsandbytes() is not None:
        return "bitsandbytes"
    if device.type == "cpu" and torch.cpu._is_vnni_supported():
        return "int_mm"
    return "dequantise"


def resolved(setting: str, device: torch.device) -> Product:
    """The recipe's teacher.int8_product, "auto" by `choose`. Raises ValueError for one that this machine does not have."""
    product = choose(device) if setting == "auto" else cast(Product, setting)
    if product == "bitsandbytes" and bitsandbytes() is None:
        raise ValueError("teacher.int8_product = 'bitsandbytes': not installed; `pip install bitsandbytes`, or set it to auto")
    if product == "onednn" and (device.type != "cpu" or "onednn" not in torch.backends.quantized.supported_engines):
        raise ValueError("teacher.int8_product = 'onednn': is for x86 CPUs and a torch with oneDNN's integer products; set it to auto")
    return product


def levels_of(product: Product | None) -> int:
    """What a row's largest weight becomes for this way to multiply; None: for any that `choose` gives."""
    return ONEDNN_LEVELS if product == "onednn" else LEVELS


def linear(
    x: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None, threshold: float = 0.0, product: Product | None = None
) -> Tensor:
    """x (..., I) times the transposed matrix plus bias: (..., O) in x's type.

    threshold: activations with a magnitude of at least this are not quantised but multiplied in x's type; 0 quantises all. "dequantise"
    quantises none. product: default `choose(x.device)`; of a matrix with more than `levels_of(product)` "onednn" may cut sums off.
    """
    chosen = product or choose(x.device)
    x_MI = x.reshape(-1, x.shape[-1])
    if chosen == "dequantise" or not _takes_integers(x_MI, weight_OI):
        product_MO = F.linear(x_MI, _dequantised(weight_OI, scale_O, x.dtype))
    else:
        product_MO = _in_chunks(x_MI, weight_OI, scale_O, threshold, chosen)
    if bias_O is not None:
        product_MO = product_MO + bias_O.to(x.dtype)
    return product_MO.reshape(*x.shape[:-1], len(weight_OI))


def quantise_rows(values_MI: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """int8 (M, I) and float32 scale (M,) with values ~ int8 * scale: a row's largest magnitude becomes `levels`. Zeros get scale 1.

    The error of an element is at most half of its row's scale, so of 127 levels 0.4 % of the row's largest. Works on the meta device.
    """
    scale_M = values_MI.abs().amax(dim=1).float() / levels
    scale_M = torch.where(scale_M == 0, 1.0, scale_M)
    return (values_MI / scale_M[:, None]).round_().to(torch.int8), scale_M


@functools.cache
def bitsandbytes() -> ModuleType | None:
    """Imported at its first product (it takes seconds and looks for a GPU); None where it is not installed."""
    return importlib.import_module("bitsandbytes") if importlib.util.find_spec("bitsandbytes") is not None else None


def _takes_integers(x_MI: Tensor, weight_OI: Tensor) -> bool:
    """cuBLASLt multiplies integers of sizes that 8 divides. The meta device, on which memory is planned, counts as CUDA."""
    fits = x_MI.device.type == "cpu" or (weight_OI.shape[0] % 8 == 0 and weight_OI.shape[1] % 8 == 0)
    return fits and len(x_MI) > 0


def _dequantised(weight_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplied in float32 and rounded once: a scale rounded to bf16 would shift a whole row by up to 0.4 %."""
    if weight_OI.device.type == "cpu":
        # 2 to 6 times as fast on a CPU as one operation of mixed types (31 ms instead of 197 for 8192 x 1664 in bf16), without temporary.
        return weight_OI.float().mul_(scale_O[:, None]).to(dtype)
    return torch.mul(weight_OI, scale_O[:, None], out=torch.empty(weight_OI.shape, dtype=dtype, device=weight_OI.device))


def _in_chunks(x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor, threshold: float, product: Product) -> Tensor:
    rows = max(FEWEST_ROWS, CHUNK_ELEMENTS // max(weight_OI.shape))
    if len(x_MI) <= rows:
        return _chunk(x_MI, weight_OI, scale_O, threshold, product)
    product_MO = x_MI.new_empty(len(x_MI), len(weight_OI))
    end = rows if x_MI.device.type == "meta" else len(x_MI)  # one chunk shows the memory that each needs
    for start in range(0, end, rows):
        product_MO[start : start + rows] = _chunk(x_MI[start : start + rows], weight_OI, scale_O, threshold, product)
    return product_MO


def _chunk(x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor, threshold: float, product: Product) -> Tensor:
    """One chunk's product, in x's type."""
    outlier_MI = None
    regular_MI = x_MI
    if threshold > 0:
        outlier_MI = x_MI.abs() >= threshold  # False for NaN, which stays and makes its row NaN
        regular_MI = x_MI.masked_fill(outlier_MI, 0.0)
    missing = FEWEST_ROWS - len(x_MI) if x_MI.device.type != "cpu" else 0
    if missing > 0:
        regular_MI = F.pad(regular_MI, (0, 0, 0, missing))
    # On meta: the planning machine may lack bitsandbytes, and for a chunk the two need nearly the same memory.
    ways = {"bitsandbytes": _bitsandbytes, "onednn": _onednn}
    multiply = _int_mm if x_MI.device.type == "meta" else ways.get(product, _int_mm)
    product_MO = multiply(regular_MI, weight_OI, scale_O)[: len(x_MI)]
    if outlier_MI is not None and x_MI.device.type != "meta":
        columns_C = outlier_MI.any(dim=0).nonzero().flatten()
        if len(columns_C):
            outlier_MC = x_MI[:, columns_C].where(outlier_MI[:, columns_C], 0.0)
            product_MO = product_MO + F.linear(outlier_MC, _dequantised(weight_OI[:, columns_C], scale_O, x_MI.dtype))
    return product_MO


def _bitsandbytes(x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """On CUDA its kernels read and write float16: activations and products of a magnitude above 65504 become infinite."""
    library = bitsandbytes()
    if library is None:
        raise ValueError("product = 'bitsandbytes': not installed; `pip install bitsandbytes`, or ask for 'dequantise'")
    narrow_MI = x_MI.half() if x_MI.device.type == "cuda" else x_MI
    x8_MI, absmax_M, _ = library.functional.int8_vectorwise_quant(narrow_MI.contiguous(), threshold=0.0)
    integers_MO = library.functional.int8_linear_matmul(x8_MI, weight_OI)
    # Its kernels ignore NaN when they look for the largest.
    absmax_M = torch.where(narrow_MI.abs().amax(dim=1).isfinite(), absmax_M, torch.nan)
    return torch.ops.bitsandbytes.int8_mm_dequant(integers_MO, absmax_M, scale_O * LEVELS, dtype=x_MI.dtype)  # type: ignore[no-any-return]


def _int_mm(x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    x8_MI, x_scale_M = quantise_rows(x_MI)
    return torch._int_mm(x8_MI, weight_OI.t()).float().mul_(x_scale_M[:, None]).mul_(scale_O).to(x_MI.dtype)


def _onednn(x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """The weights are packed at every product, 1 ms beside 50: they may be gathered ones, or overwritten by a calibration."""
    x8_MI, x_scale_M = quantise_rows(x_MI)
    unsigned_MI = x8_MI.view(torch.uint8).bitwise_xor_(ZERO)  # x + 128, as two's complement has it
    packed = torch.ops.onednn.qlinear_prepack(weight_OI, list(x_MI.shape))
    none_O = torch.zeros(len(scale_O), dtype=torch.int64)
    product_MO: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned_MI, 1.0, ZERO, packed, scale_O, none_O, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product_MO.mul_(x_scale_M[:, None]).to(x_MI.dtype)
