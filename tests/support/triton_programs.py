"""A launch of a Triton kernel as the program that a card would compile, without one: for tests and kernels/benchmarks/programs.py."""

from __future__ import annotations

from typing import Any

import torch

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compile_for(capability: int, kernel: Any, launch: dict[str, Any]) -> Any:
    """Triton's compiled kernel. launch: its arguments and options by name; capability: of the card, 90 for an H200."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {name: launch[name] for name in OPTIONS if name in launch}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
