"""The ways of multiplying with an int8 matrix, on the CPU, against float64."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.models.int8 import matmul
from megakd.models.int8.convert import quantise, quantise_weight
from megakd.models.int8.linear import Int8Linear, Int8PointwiseConv

WAYS = ("dequantise", "int_mm", "bitsandbytes", "onednn")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _error(found: Tensor, exact: Tensor) -> float:
    """Relative, of the whole."""
    return float((found.double() - exact).norm() / exact.norm())


def test_an_element_is_off_by_half_a_step_of_its_row_at_most() -> None:
    weight = _random(40, 96) * torch.logspace(-6, 6, 40)[:, None]
    codes, scale = quantise_weight(weight)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(codes.abs().amax(dim=1), torch.full((40,), 127, dtype=torch.int8))
    assert ((codes * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()


def test_a_row_of_zeros_stays_zeros() -> None:
    codes, scale = quantise_weight(torch.zeros(2, 5))
    assert not codes.any()
    assert torch.equal(scale, torch.ones(2))


def test_rows_are_quantised_each_for_itself() -> None:
    weight = _random(6, 10).bfloat16()
    codes, scale = quantise_weight(weight)
    for row in range(6):
        alone, its_scale = quantise_weight(weight[row : row + 1])
        assert torch.equal(alone[0], codes[row])
        assert its_scale[0] == scale[row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_linear_layer_within_a_hundredth_and_its_type(way: matmul.Product, dtype: torch.dtype) -> None:
    x, layer = _random(3, 7, 96).to(dtype), nn.Linear(96, 40).to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double()).detach()
    found = Int8Linear(layer.weight, layer.bias, product=way)(x)
    assert (found.shape, found.dtype) == ((3, 7, 40), dtype)
    assert _error(found.detach(), exact) < (0.016 if way == "onednn" else 0.012)  # which has 64 levels of the weights


@pytest.mark.parametrize("way", WAYS)
def test_one_row_and_none_at_all_are_multiplied_too(way: matmul.Product) -> None:
    layer = Int8Linear(_random(12, 8), None, product=way)
    x = _random(5, 8)
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1])
    assert layer(x[:0]).shape == (0, 12)


@pytest.mark.parametrize("way", ["int_mm", "bitsandbytes", "onednn"])
def test_a_threshold_saves_the_other_columns_from_an_outlier(way: matmul.Product) -> None:
    x, weight = _random(32, 64), _random(48, 64, seed=1)
    x[:, 5] *= 60
    given = x.clone()
    codes, scale = quantise_weight(weight, way)
    # Against the widened matrix: what is left is the error of the activations, of the columns that are no outliers.
    exact = F.linear(x.double(), codes.double() * scale.double()[:, None])
    without = matmul.linear(x, codes, scale, None, 0.0, way)
    assert torch.equal(x, given)
    kept = matmul.linear(x, codes, scale, None, 6.0, way)
    assert torch.equal(x, given)
    assert _error(kept, exact) < _error(without, exact) / 5


@pytest.mark.parametrize("way", ["int_mm", "bitsandbytes", "onednn"])
def test_a_threshold_that_nothing_reaches_changes_nothing(way: matmul.Product) -> None:
    x = _random(32, 64)
    codes, scale = quantise_weight(_random(48, 64, seed=1), way)
    assert torch.equal(matmul.linear(x, codes, scale, None, 100.0, way), matmul.linear(x, codes, scale, None, 0.0, way))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("way", WAYS)
def test_a_row_does_not_depend_on_its_neighbours(way: matmul.Product, threshold: float) -> None:
    x = _random(40, 64)
    x[::3, 5] *= 60
    x[7, 9] = 200.0
    codes, scale = quantise_weight(_random(48, 64, seed=1), way)
    together = matmul.linear(x, codes, scale, None, threshold, way)
    for row in range(len(x)):
        alone = matmul.linear(x[row : row + 1], codes, scale, None, threshold, way)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_spoils_its_row_and_no_other(way: matmul.Product, threshold: float, bad: float, dtype: torch.dtype) -> None:
    x = _random(20, 64).to(dtype)
    codes, scale = quantise_weight(_random(48, 64, seed=1), way)
    clean = matmul.linear(x, codes, scale, None, threshold, way)
    x[3, 5] = bad
    found = matmul.linear(x, codes, scale, None, threshold, way)
    assert not found[3].isfinite().any()
    assert torch.equal(found[:3], clean[:3])
    assert torch.equal(found[4:], clean[4:])


def test_onednn_never_cuts_a_sum_off() -> None:
    """The largest sums of two products that there are: without VNNI an instruction adds them in 16 bits."""
    for sign in (1.0, -1.0):
        x, (codes, scale) = torch.full((64, 128), 3.0), quantise_weight(torch.full((16, 128), sign), "onednn")
        assert codes.unique().tolist() == [sign * 64]
        found = matmul.linear(x, codes, scale, None, 0.0, "onednn")
        torch.testing.assert_close(found, torch.full((64, 16), sign * 3 * 128), rtol=1e-5, atol=0.0)


def test_onednn_is_never_chosen_by_itself_and_for_a_cpu_alone() -> None:
    assert matmul.choose(torch.device("cpu")) != "onednn"
    assert matmul.resolved("onednn", torch.device("cpu")) == "onednn"
    with pytest.raises(ValueError, match=r"teacher\.int8_product = 'onednn': is for x86 CPUs.*set it to auto"):
        matmul.resolved("onednn", torch.device("cuda"))


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_zeros_stay_zeros(way: matmul.Product) -> None:
    x = _random(3, 64)
    x[1] = 0
    codes, scale = quantise_weight(_random(48, 64, seed=1), way)
    found = matmul.linear(x, codes, scale, None, 0.0, way)
    assert not found[1].any()
    assert found[0].all()


@pytest.mark.parametrize("way", ["int_mm", "bitsandbytes", "onednn"])
def test_many_rows_go_through_in_pieces_and_come_out_the_same(way: matmul.Product, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _random(333, 64)
    x[5, 5] *= 60
    codes, scale = quantise_weight(_random(48, 64, seed=1), way)
    whole = matmul.linear(x, codes, scale, None, 6.0, way)
    monkeypatch.setattr(matmul, "CHUNK_ELEMENTS", 64 * 50)
    torch.testing.assert_close(matmul.linear(x, codes, scale, None, 6.0, way), whole, rtol=1e-6, atol=1e-5)


def test_few_rows_are_filled_up_on_a_gpu_and_so_measured_on_meta() -> None:
    """cuBLASLt refuses up to 16 rows of integers: they are not computed otherwise than the same rows in a larger batch."""
    meta = torch.device("meta")
    codes, scale = torch.empty(48, 64, dtype=torch.int8, device=meta), torch.empty(48, device=meta)
    for rows in (1, 16, 17, 100):
        found = matmul.linear(torch.empty(rows, 64, device=meta), codes, scale, None, 6.0, "bitsandbytes")
        assert found.shape == (rows, 48)


@pytest.mark.parametrize("way", WAYS)
def test_activations_of_another_width_are_an_error(way: matmul.Product) -> None:
    codes, scale = quantise_weight(_random(48, 64))
    for width in (63, 65, 1):
        with pytest.raises((RuntimeError, ValueError)):
            matmul.linear(_random(4, width), codes, scale, None, 0.0, way)


def test_the_recipes_threshold_reaches_every_layer() -> None:
    tower = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    quantise(tower, threshold=6.0, product="int_mm")
    layers = [module for module in tower.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 3
    assert {(layer.threshold, layer.product) for layer in layers} == {(6.0, "int_mm")}


def test_a_product_that_is_resolved_for_a_device_decides_for_all_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "bitsandbytes", lambda: None)
    tower = nn.Sequential(nn.Linear(8, 8))
    product = matmul.resolved("auto", torch.device("cuda"))
    assert product == "dequantise"
    quantise(tower, product=product)
    assert tower[0].product == "dequantise"


def test_a_gpu_takes_bitsandbytes_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matmul.choose(torch.device("cuda")) == "bitsandbytes"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    matmul.bitsandbytes.cache_clear()
    try:
        assert matmul.choose(torch.device("cuda")) == "dequantise"
        with pytest.raises(ValueError, match="pip install bitsandbytes"):
            Int8Linear(_random(8, 8), None, product="bitsandbytes")(_random(2, 8))
    finally:
        matmul.bitsandbytes.cache_clear()


def test_a_cpu_without_integer_instructions_dequantises(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, way in ((False, "dequantise"), (True, "int_mm")):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda supported=supported: supported)
        assert matmul.choose(torch.device("cpu")) == way


def test_bitsandbytes_is_not_imported_before_a_product_wants_it() -> None:
    program = "import sys, torch; from megakd.models.int8 import matmul as p; codes, scale = p.quantise_rows(torch.ones(8, 8)); "
    program += "p.linear(torch.ones(2, 8), codes, scale, None); sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_layers_scale_stays_float32_in_whatever_type_the_tower_runs() -> None:
    layer = Int8Linear(_random(8, 8), nn.Parameter(_random(8)))
    before = layer.scale.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.scale, before)
    assert (layer.weight.dtype, layer.bias.dtype, layer.int8_original_dtype) == (torch.int8, torch.bfloat16, torch.bfloat16)
    assert layer.float().int8_original_dtype == torch.float32


def test_a_gradient_flows_through_a_frozen_layer_that_dequantises() -> None:
    x = _random(3, 8).requires_grad_()
    codes, scale = quantise_weight(_random(5, 8))
    matmul.linear(x, codes, scale, None, product="dequantise").sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (codes * scale[:, None]).sum(0).expand(3, 8))


def test_a_pointwise_convolution_is_a_linear_layer_over_the_channels() -> None:
    conv = nn.Conv2d(8, 12, 1)
    x = _random(2, 8, 5, 5)
    found = Int8PointwiseConv(conv.weight, conv.bias, product="dequantise")(x)
    assert found.shape == (2, 12, 5, 5)
    assert _error(found.detach(), conv(x).detach().double()) < 0.01
