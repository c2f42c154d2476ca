"""One place decides precision: by the device, unless the environment says otherwise, and alike on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megakd.runtime import precision
from support import PROGRAMS
from support.programs.precision import CASES
from support.runs import run_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_gpu_computes_in_bf16_and_a_cpu_in_float32_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(precision.VARIABLE, raising=False)
    assert (precision.of(CUDA), precision.of(CPU)) == ("bf16", "fp32")
    for asked in ("bf16", "fp32"):
        monkeypatch.setenv(precision.VARIABLE, asked)
        assert precision.of(CUDA) == precision.of(CPU) == asked


def test_an_unknown_precision_names_the_variable_and_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(precision.VARIABLE, "float16")
    with pytest.raises(ValueError, match=r"MEGAKD_PRECISION = 'float16'.*bf16 or fp32"):
        precision.of(CPU)


def _fail_in_a_tower() -> None:
    with precision.of_towers(CUDA):
        assert torch.get_float32_matmul_precision() == "high"
        raise ZeroDivisionError


def test_tf32_is_for_towers_on_a_gpu_alone_and_off_again_after_them() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with precision.of_towers(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ZeroDivisionError):
        _fail_in_a_tower()
    assert torch.get_float32_matmul_precision() == "highest"


def test_ranks_that_would_compute_in_different_types_all_end_with_the_reason(tmp_path: Path) -> None:
    run_ranks(PROGRAMS / "precision.py", tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert first.keys() == CASES.keys()
    for name in ("alike", "told what it does anyway"):
        assert first[name] is None
        assert second[name] is None
    for told in (first, second):
        assert told["one was told"] == "rank 1 computes in fp32 and rank 0 in bf16: export MEGAKD_PRECISION to every rank, or to none"
        assert "rank 1 has no GPU and rank 0 has one" in told["one has no GPU"]
        assert "rank 1 has no GPU and rank 0 has one" in told["one has no GPU but was told"]
    assert "on rank 1 is neither bf16 nor fp32" in first["one has a typing mistake"]
    assert "MEGAKD_PRECISION = 'bfloat'" in second["one has a typing mistake"]
