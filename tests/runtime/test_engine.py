"""The engine on real DeepSpeed, every stage and precision, on one rank and on two: what it exports is all there is to a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.runtime import launch as ranks
from megakd.runtime.engine import State
from support import PROGRAMS
from support.parameter_groups import decay_groups
from support.programs.engine_states import ACCUMULATED, CONFIGURATIONS, OFFLOADED, OPTIM, Odd, data, measure, measure_all, why_not_compile
from support.runs import run_ranks

# DeepSpeed compiles its CPU operators at the first use in an environment: a minute of two cores, three on a busy machine.
pytestmark = pytest.mark.timeout(900)

Measured = dict[str, dict[str, Any]]
EXACT = [name for name in CONFIGURATIONS if name.endswith("fp32")]


def _read(folder: Path) -> Measured:
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in CONFIGURATIONS}


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    world = ranks.start()
    try:
        measure_all(world, folder, None)
    finally:
        ranks.stop()
    return folder


@pytest.fixture(scope="module")
def on_two(on_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(PROGRAMS / "engine_states.py", folder, on_one, seconds=600)
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def measured(request: pytest.FixtureRequest) -> Measured:
    return _read(request.getfixturevalue("on_one" if request.param == 1 else "on_two"))


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = [(a[part], b[part]) for part in ("weights", "moments", "averages")]
    return a["updates"] == b["updates"] and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in tensors)


def _assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["updates"] == b["updates"]
    for part in ("weights", "moments", "averages"):
        for name, value in a[part].items():
            torch.testing.assert_close(value, b[part][name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_new_engine_holds_exactly_the_state_it_was_started_with(name: str, measured: Measured) -> None:
    assert _same(measured[name]["restored"], measured[name]["middle"])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_resumed_engine_goes_on_to_the_last_bit_as_an_undisturbed_one(name: str, measured: Measured) -> None:
    assert measured[name]["norms_resumed"] == measured[name]["norms"]
    assert _same(measured[name]["end_resumed"], measured[name]["end"])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_state_is_complete_fp32_and_moves(name: str, measured: Measured) -> None:
    middle, end = measured[name]["middle"], measured[name]["end"]
    module = Odd()
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    assert {key: value.shape for key, value in middle["weights"].items()} == shapes
    trained = {key for key, _ in module.named_parameters()}
    assert set(middle["moments"]) == {f"{moment}/{key}" for moment in ("exp_avg", "exp_avg_sq") for key in trained}
    assert (middle["updates"], end["updates"]) == (2, 4)
    for key in trained:
        assert middle["weights"][key].dtype == torch.float32
        assert not torch.equal(middle["weights"][key], end["weights"][key]), key
        assert middle["moments"][f"exp_avg/{key}"].abs().sum() > 0, key
    assert torch.equal(end["weights"]["offset"], torch.full((3,), 0.25))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_state_of_one_rank_starts_two_ranks(name: str, on_one: Path, on_two: Path) -> None:
    one, two = _read(on_one)[name], _read(on_two)[name]
    assert _same(two["foreign_restored"], one["middle"])
    if name in EXACT:
        _assert_close(two["end_of_foreign"], one["end"])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_state_of_two_ranks_starts_one_rank(name: str, on_two: Path) -> None:
    two = _read(on_two)[name]
    world = ranks.start()
    try:
        found = measure(name, world, State(**two["middle"]))
    finally:
        ranks.stop()
    assert _same(found["foreign_restored"], two["middle"])
    if name in EXACT:
        _assert_close(found["end_of_foreign"], two["end"])


@pytest.mark.parametrize("name", EXACT)
def test_every_stage_on_one_rank_or_two_is_torchs_adamw(name: str, measured: Measured) -> None:
    """The reference: torch alone on the whole batch, its clipping and its AdamW with decay on matrices."""
    module = Odd()
    optimizer = torch.optim.AdamW(decay_groups(module, OPTIM.weight_decay), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    norms = []
    for step in range(4):
        x, y = data(step)
        (module(x)["y"] - y).square().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), OPTIM.clip)))
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > OPTIM.clip, "the data must make clipping act"
    assert measured[name]["norms"] == pytest.approx(norms, rel=1e-5)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(measured[name]["end"]["weights"][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name not in EXACT])
def test_bf16_keeps_fp32_weights_that_stay_near_the_fp32_run(name: str, measured: Measured) -> None:
    found, exact = measured[name]["end"]["weights"], measured["stage1_fp32"]["end"]["weights"]
    for key, value in exact.items():
        torch.testing.assert_close(found[key], value, rtol=0.1, atol=0.05)
    matrix = found["first.weight"]
    assert not torch.equal(matrix, matrix.bfloat16().float()), "the master weights have more bits than bf16"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_average_is_the_sum_of_all_weights_so_far_each_weighed_by_its_age(name: str, measured: Measured) -> None:
    assert OPTIM.ema is not None
    keeps, trail = OPTIM.ema.decay, measured[name]["trail"]
    last = len(trail) - 1
    weighed = [keeps**last] + [(1 - keeps) * keeps ** (last - at) for at in range(1, last + 1)]
    assert sum(weighed) == pytest.approx(1)
    averages = measured[name]["end"]["averages"]
    assert averages.keys() == trail[0].keys()
    for key, found in averages.items():
        expected = sum(share * weights[key].double() for share, weights in zip(weighed, trail, strict=True))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(averages["last.weight"], trail[-1]["last.weight"])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_module_that_holds_the_average_for_a_block_has_its_own_weights_behind_it(name: str, measured: Measured) -> None:
    found = measured[name]
    assert _same(found["unmoved"], found["end"])
    if not name.startswith("stage3"):
        assert torch.equal(found["averaged_scale"], found["end"]["averages"]["log_scale"].exp())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_forward_sees_the_scale_that_the_optimizer_holds_in_float32(name: str, measured: Measured) -> None:
    held = measured[name]["end"]["weights"]["log_scale"]
    assert not torch.equal(held, held.bfloat16().float()), "else bf16 would show nothing"
    assert measured[name]["scale"].dtype == torch.float32
    assert torch.equal(measured[name]["scale"], held.exp())


@pytest.mark.parametrize("name", ACCUMULATED)
def test_gradients_of_pieces_add_up_in_float32(name: str, on_one: Path) -> None:
    """The reference: torch alone, each piece's gradient in bf16, their sum in float32."""
    first = _read(on_one)[name]["first"]
    module = Odd().bfloat16()
    total = {key: torch.zeros(value.shape) for key, value in module.named_parameters()}
    for x, y in zip(*(part.tensor_split(2) for part in data(0)), strict=True):
        module.zero_grad()
        ((module(x.bfloat16())["y"].float() - y).square().mean() / 2).backward()
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None
            total[key] += parameter.grad.float()
    norm = torch.cat([value.flatten() for value in total.values()]).norm()
    assert norm > OPTIM.clip, "the data must make clipping act"
    for key, value in total.items():
        found = first["moments"][f"exp_avg/{key}"] / (1 - OPTIM.betas[0])
        torch.testing.assert_close(found, value * (OPTIM.clip / norm), rtol=2e-5, atol=0)


def test_weight_decay_falls_on_matrices_alone() -> None:
    groups = decay_groups(Odd(), 0.1)
    assert [(group["weight_decay"], sorted(tuple(p.shape) for p in group["params"])) for group in groups] == [  # type: ignore[attr-defined]
        (0.1, [(3, 5), (5, 7)]),
        (0.0, [(1,), (3,), (5,), (5,), (5,)]),
    ]


@pytest.mark.skipif(why_not_compile() is not None, reason=str(why_not_compile()))
def test_the_offloaded_configuration_is_among_those_tested() -> None:
    assert "offload_optimizer" in CONFIGURATIONS[OFFLOADED]["zero_optimization"]
