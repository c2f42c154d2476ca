"""The losses multiply in float32 whatever the program around has switched on: autocast, TF32, products of a lower precision.

On a CPU as on CUDA the switches are the process's, so what is in force at each product of a forward and a backward pass can be read here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megakd_kernels import interactive_kd, sigmoid_kd, similarity_kd
from megakd_kernels.precision import full_precision
from support.loss_cases import Batch, batch

STUDENT, TEACHER, EQUAL = batch(37, 48, 50, -10, seed=1), batch(37, 64, 80, -10, seed=2), batch(37, 48, 20, seed=3)

LOSSES = {
    "similarity": lambda student, **options: sum(similarity_kd(student, TEACHER, hard=True, temperature=2.0, **options)),
    "sigmoid": lambda student, **options: sum(sigmoid_kd(student, TEACHER, hard=True, **options)),
    "interactive": lambda student, **options: interactive_kd(student, EQUAL, **options),
}


def _gradients(leaves: Batch) -> list[Tensor]:
    return [gradient for gradient in leaves.gradients() if gradient is not None]


BACKENDS = {"eager": {"backend": "eager"}, "chunked": {"backend": "chunked", "chunk": 7}}
PRODUCTS = ("mm", "addmm", "bmm", "addmm_", "baddbmm")


class _Products(TorchDispatchMode):
    """Remembers what was in force at each matrix product, and in which dtype it was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            in_force = (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
            self.seen.append((*in_force, args[0].dtype))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _switched(how: str) -> Iterator[None]:
    """TF32 and its like on, by one of torch's two interfaces; as it was at the end."""
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = cuda.fp32_precision, mkldnn.fp32_precision
    if how == "newer":
        cuda.fp32_precision, mkldnn.fp32_precision = "tf32", "bf16"
    else:
        torch.set_float32_matmul_precision(how)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        cuda.fp32_precision, mkldnn.fp32_precision = before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("how", ["high", "medium", "newer"])
def test_every_product_of_a_loss_and_its_gradient_is_of_float32_in_full(how, loss, backend):
    plain = STUDENT.leaves()
    LOSSES[loss](plain, **BACKENDS[backend]).backward()
    leaves = STUDENT.leaves()
    with _switched(how), torch.autocast("cpu", torch.bfloat16), _Products() as products:
        inside = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        LOSSES[loss](leaves, **BACKENDS[backend]).backward()
        after = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    assert len(products.seen) >= 3
    assert set(products.seen) == {("ieee", "ieee", torch.float32)}
    assert after == inside != ("ieee", "ieee")
    assert all(torch.equal(one, other) for one, other in zip(_gradients(leaves), _gradients(plain), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_the_compiled_backend_is_not_moved_by_switches_either(loss):
    plain, leaves = STUDENT.leaves(), STUDENT.leaves()
    LOSSES[loss](plain, backend="compiled").backward()
    with _switched("medium"), torch.autocast("cpu", torch.bfloat16):
        LOSSES[loss](leaves, backend="compiled").backward()
    assert all(torch.equal(one, other) for one, other in zip(_gradients(leaves), _gradients(plain), strict=True))


def test_what_was_switched_on_stays_readable_and_is_on_again_after_an_error():
    with _switched("high"):
        with contextlib.suppress(KeyError), full_precision(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.gpu
def test_tf32_around_a_loss_changes_no_bit_on_a_gpu():
    found = []
    for how in ("highest", "high"):
        leaves = STUDENT.to("cuda").leaves()
        with _switched(how):
            sum(similarity_kd(leaves, TEACHER.to("cuda"), hard=True, backend="eager")).backward()
        found.append(_gradients(leaves))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
