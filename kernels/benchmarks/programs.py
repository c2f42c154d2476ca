"""How many Triton programs the gpu tests of tests/kernels compile, and what compiling them for an H200 takes, without a GPU.

    PYTHONPATH=kernels:tests python kernels/benchmarks/programs.py

The tests run here with recorders in the kernels' place; their results are noise and are not looked at. A launch is another program where
a constant, a dtype, or an integer's being 1 or a multiple of 16 differs. Of each kernel a few programs are compiled for sm_90, and the
others are taken to need as many processor seconds.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from support.triton_programs import OPTIONS, compile_for

KERNELS = Path(__file__).parents[1]
REPOSITORY = KERNELS.parent
SAMPLED = 3
Program = tuple[tuple[str, object], ...]


class Recorder:
    """Stands where a kernel stands and keeps one launch of each program."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.programs: dict[Program, dict[str, Any]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, values, strict=False)) | named
            key = [(name, self._kind(name, value)) for name, value in sorted(arguments.items())]
            self.programs.setdefault(tuple(key), arguments)

        return launch

    def _kind(self, name: str, value: Any) -> object:
        constants = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        if name in constants or name in OPTIONS:
            return value
        if isinstance(value, torch.Tensor):
            return value.dtype
        return "float" if isinstance(value, float) else (value == 1, value % 16 == 0)

    def seconds(self, arguments: dict[str, Any]) -> float:
        """To compile one program for sm_90, ptxas and all."""
        began = _processor_seconds()
        compile_for(90, self.kernel, arguments)
        return _processor_seconds() - began


def _processor_seconds() -> float:
    """Of this process and of the assemblers that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class OnThisMachine:
    """The gpu tests that launch Triton kernels, on the CPU, whatever comes out."""

    def __init__(self) -> None:
        self.gpu_tests = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.gpu_tests = len([item for item in items if item.get_closest_marker("gpu")])
        kept = []
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            if item.get_closest_marker("gpu") and (parameters.get("device") == "cuda" or parameters.get("backend") == "triton"):
                if "device" in parameters:
                    parameters["device"] = "cpu"
                if parameters.get("backend", "triton") == "triton":
                    kept.append(item)
        items[:] = kept


def main() -> int:
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # not from its cache
    from megakd_kernels import dispatch
    from megakd_kernels.triton import one_pass, slope, statistics
    from support import loss_cases

    places = [(statistics, "_statistics_kernel"), (statistics, "_merge_kernel"), (slope, "_slope_kernel")]
    places += [(one_pass, "_exp_panel_kernel"), (one_pass, "_sigmoid_panel_kernel")]
    recorders = {name: Recorder(getattr(module, name)) for module, name in places}
    for module, name in places:
        setattr(module, name, recorders[name])
    dispatch.why_not_triton = lambda device, dtype: None
    loss_cases.Batch.to = lambda self, device: self
    tests = OnThisMachine()
    quietly = ["-q", "--no-header", "--tb=no", "--show-capture=no", "-rN", "-p", "no:cacheprovider"]
    # without the conftest, as in `make gpu`: it would skip gpu tests here
    pytest.main([*quietly, "--noconftest", "-m", "gpu", str(REPOSITORY / "tests" / "kernels")], [tests])
    print(f"{tests.gpu_tests} gpu tests")
    total = 0.0
    for name, recorder in recorders.items():
        programs = list(recorder.programs.values())
        sample = list(itertools.islice(programs, 0, None, max(1, len(programs) // SAMPLED)))[:SAMPLED]
        seconds = mean(recorder.seconds(arguments) for arguments in sample) if sample else 0.0
        total += seconds * len(programs)
        print(f"{name}: {len(programs)} programs of {seconds:.2f} processor seconds each", flush=True)
    print(f"in all {total:.0f} processor seconds of compiling")
    return 0


if __name__ == "__main__":
    sys.exit(main())
