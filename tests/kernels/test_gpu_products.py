"""What only a GPU does: products of halves summed in float32, and launches on a device that is not the current one."""

from __future__ import annotations

import pytest
import torch

from megakd_kernels import interactive_kd, similarity_kd
from megakd_kernels.panels import STRIP_BYTES, add_product
from support.loss_cases import batch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_of_half_products_is_that_of_float64_and_takes_no_second_matrix(dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    left = torch.randn(131_072, 64, device="cuda", generator=generator).to(dtype)
    right = torch.randn(64, 768, device="cuda", generator=generator).to(dtype)
    total = torch.ones(131_072, 768, device="cuda")
    add_product(total[:64], left[:64], right)  # libraries take their workspace
    total.fill_(1.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    add_product(total, left, right)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * STRIP_BYTES
    expected = 1 + left[:512].double() @ right.double()
    assert (total[:512] - expected).abs().max() <= 1e-4


def test_the_losses_run_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = []
    for device in ("cuda:0", "cuda:1"):
        leaves, teacher = (
            batch(300, 48, 50.0, dtype=torch.bfloat16).to(device).leaves(),
            batch(300, 48, 30.0, dtype=torch.bfloat16, seed=3).to(device),
        )
        loss = similarity_kd(leaves, teacher, hard=True, backend="triton").kd + interactive_kd(leaves, teacher, backend="triton")
        loss.backward()
        found.append([loss.detach().cpu(), *(gradient.cpu() for gradient in leaves.gradients()[:3])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
