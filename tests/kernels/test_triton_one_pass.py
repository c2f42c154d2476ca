"""The triton backend of `interactive_kd` and `sigmoid_kd`: its numbers under Triton's interpreter, and its code for Hopper."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from support import PROGRAMS, python_path
from support.loss_cases import EPS, errors, forward, measure, measure_reference
from support.one_pass_cases import LOSSES, MARGIN, interpreted, judge, make, rounding
from support.programs.interpreted_one_pass import HALVES, SIZES, accuracy_cases, pair_of

pytest.importorskip("triton", reason="the triton backend needs the package triton; 'chunked' computes the same and is tested without it")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """Everything below from one process: the interpreter must be chosen before Triton is imported."""
    return interpreted(str(PROGRAMS / "interpreted_one_pass.py"), tmp_path_factory.mktemp("interpreted") / "found.pt")


@pytest.mark.parametrize("name", accuracy_cases(), ids=lambda name: "-".join(map(str, name)))
def test_losses_and_gradients_match_float64(found, name):
    case, _ = accuracy_cases()[name]
    judge(case, {"eager": measure(case, backend="eager"), "triton": found["accuracy"][name]}, MARGIN[case.loss])


def test_logits_of_any_size_and_sign_give_a_divergence_exact_to_a_few_of_their_roundings(found):
    for (a, b), outcome in zip(SIZES, found["sizes"], strict=True):
        case = pair_of(a, b)
        truth = measure_reference(case)
        off = errors(outcome, truth)
        assert off.kd <= 3 * EPS * (truth.kd + torch.sigmoid(-torch.tensor(b).abs()) * (1 + abs(a - b))) + 1e-15 * abs(a), (a, b)
        assert off.hard <= 3 * EPS * truth.hard, (a, b)
        assert off.bias <= 4 * rounding(case).bias, (a, b)


def test_a_student_equal_to_its_teachers_has_a_divergence_of_exactly_zero(found):
    assert [float(outcome.kd) for outcome in found["twins"]] == [0.0, 0.0]


def test_two_runs_give_the_same_bits(found):
    for one, other in zip(found["twins"], found["again"], strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("diagonal", [None, 12])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_slopes_are_written_in_half_precision_as_a_cast_of_the_float32_ones(found, dtype, diagonal):
    """To the last digit but one: the interpreter of Triton 3.8 cuts bfloat16 off where a GPU rounds."""
    gain = 2.0**14 if dtype == torch.float16 else 1.0
    halves, singles = found["slopes"][str(dtype), diagonal]
    for half, single in zip(halves, singles, strict=True):
        assert half.dtype == dtype
        assert torch.allclose(half.float(), single * gain, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("loss", LOSSES)
def test_triton_is_refused_where_it_cannot_run(loss, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make(loss, 5, 8, 10.0, [(8, 10.0, 0.0)])
    with pytest.raises(ValueError, match="needs a CUDA device"):
        forward(case, case.student, backend="triton")


COMPILE = """
import re, subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia
from megakd_kernels.triton.one_pass import COLUMNS, WARPS, _exp_panel_kernel, _sigmoid_panel_kernel

INTEGERS = ("rows", "teacher_rows", "columns", "diagonal")

def spilled(kernel, slopes, **chosen):
    chosen |= {"SLOPES": True, "BLOCK": COLUMNS}
    signature = {name: "*fp32" for name in kernel.arg_names}
    signature |= {name: "*bf16" for name in slopes} | {name: "i32" for name in INTEGERS if name in signature}
    signature |= {"half_gain": "fp32"} | {name: "constexpr" for name in chosen}
    source = ASTSource(fn=kernel, signature=signature, constexprs=chosen)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS}).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [nvidia.ptxas.path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\\d+) bytes spill", report)))

print(spilled(_exp_panel_kernel, ["exp_cM"], DIAGONAL=True))
for teachers, hard in ((0, True), (1, False), (1, True), (3, True)):
    print(spilled(_sigmoid_panel_kernel, ["kd_cM", "hard_cM"], DIAGONAL=True, TEACHERS=teachers, HARD=hard))
"""


def test_the_kernels_compile_for_hopper_without_a_spilled_register():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": python_path()}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["0"] * 5
