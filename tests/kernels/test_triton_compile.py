"""Every Triton kernel compiles for the cards we name, onto their matrix units, without a card at hand.

The kernels' own callers run with a recorder in the kernels' place: what is compiled is what they launch.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megakd_kernels.panels import Logits
from megakd_kernels.softmax_stats import SlopeWeights
from support.triton_programs import compile_for

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter has nothing to compile", allow_module_level=True)

from megakd_kernels.triton import slope as triton_slope  # noqa: E402
from megakd_kernels.triton import statistics as triton_statistics  # noqa: E402


class Recorder:
    """Stands where a kernel stands and keeps the arguments of each launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            self.launches.append(dict(zip(self.kernel.arg_names, values, strict=False)) | named)

        return launch


class Card(NamedTuple):
    """What a card has. product: the instruction of its matrix units. shared: bytes of shared memory a program can have."""

    product: str
    shared: int


class Compiled(NamedTuple):
    """What the compilers say about one kernel on one card. spilled: bytes stored and loaded."""

    ptx: str
    shared: int
    spilled: int


def compiled(kernel: Any, launch: dict[str, Any], capability: int, where: Path) -> Compiled:
    made = compile_for(capability, kernel, launch)
    ptx = where / "kernel.ptx"
    ptx.write_text(made.asm["ptx"])
    arch = re.search(r"\.target (sm_\w+)", made.asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch[1]}", str(ptx), "-o", str(where / "kernel.cubin")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = sum(int(found) for found in re.findall(r"(\d+) bytes spill", said))
    return Compiled(made.asm["ptx"], made.metadata.shared, spilled)


def batch(teachers: int, dtype: torch.dtype, rows: int, widths: tuple[int, int]) -> tuple[Logits, list[Logits]]:
    """Only the shapes matter."""
    sides = [Logits(*torch.empty(2, rows, width, dtype=dtype), torch.tensor(14.0)) for width in (widths[0], *[widths[1]] * teachers)]
    return sides[0], sides[1:]


class Variant(NamedTuple):
    """A loss as the kernels meet it. By default ViT-B/16 under ViT-L/14 in bfloat16, tiles without a rest."""

    teachers: int = 1
    hard_temperature: float | None = None
    static: bool = False
    dtype: torch.dtype = torch.bfloat16
    rows: int = 256
    widths: tuple[int, int] = (512, 768)

    def __str__(self) -> str:
        return (
            ", ".join(f"{name}={value}" for name, value in self._asdict().items() if value != Variant._field_defaults[name])
            or "one teacher"
        )


def statistics_launches(monkeypatch: pytest.MonkeyPatch, variant: Variant) -> list[tuple[Any, dict[str, Any]]]:
    student, teachers = batch(variant.teachers, variant.dtype, variant.rows, variant.widths)
    kernels = [Recorder(triton_statistics._statistics_kernel), Recorder(triton_statistics._merge_kernel)]
    with monkeypatch.context() as patched:
        patched.setattr(triton_statistics, "_statistics_kernel", kernels[0])
        patched.setattr(triton_statistics, "_merge_kernel", kernels[1])
        triton_statistics.stripe_statistics(student, teachers, variant.hard_temperature, diagonal=0, static=variant.static)
    return [(one.kernel, one.launches[0]) for one in kernels]


def slope_launches(monkeypatch: pytest.MonkeyPatch, variant: Variant) -> list[tuple[Any, dict[str, Any]]]:
    student, teachers = batch(variant.teachers, variant.dtype, variant.rows, variant.widths)
    line, above = torch.ones(variant.rows), torch.ones(variant.teachers, variant.rows)
    hard = None if variant.hard_temperature is None else line
    side = SlopeWeights(line, line, hard, above, -above) if teachers else SlopeWeights(line, line, hard, None, None)
    recorder = Recorder(triton_slope._slope_kernel)
    out = torch.empty(variant.rows, variant.rows, dtype=variant.dtype)
    with monkeypatch.context() as patched:
        patched.setattr(triton_slope, "_slope_kernel", recorder)
        triton_slope.slope_panel(
            student, teachers, side, side, hard_temperature=variant.hard_temperature, diagonal=0, diagonal_weight=torch.ones(()), out_cM=out
        )
    return [(recorder.kernel, launch) for launch in recorder.launches]


CARDS = {90: Card("wgmma.mma_async", 227 << 10), 80: Card("mma.sync", 163 << 10)}
STATISTICS = [Variant(), Variant(hard_temperature=2.0), Variant(static=True), Variant(teachers=0), Variant(teachers=0, static=True)]
SLOPES = [Variant(), Variant(hard_temperature=2.0), Variant(teachers=0), Variant(teachers=2)]
# Bytes spilled, stored and loaded. Measured with Triton 3.8: 56 in the online statistics with a second normaliser on sm_90, 360 to 500
# in the slope on sm_80, none elsewhere; with Triton 3.6 those statistics spill 352 on sm_80. A tile that does not fit spills thousands.
SPILLED = {("statistics", 90): 160, ("statistics", 80): 480, ("slope", 90): 160, ("slope", 80): 800}


@pytest.mark.parametrize("capability", CARDS, ids="sm_{}".format)
@pytest.mark.parametrize("variant", STATISTICS, ids=str)
def test_statistics_use_the_matrix_units_and_hardly_spill(
    variant: Variant, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (products, launch), (fold, folding) = statistics_launches(monkeypatch, variant)
    made = compiled(products, launch, capability, tmp_path)
    assert CARDS[capability].product in made.ptx
    assert made.shared <= CARDS[capability].shared
    assert made.spilled <= SPILLED["statistics", capability]
    assert compiled(fold, folding, capability, tmp_path).spilled == 0


@pytest.mark.parametrize("capability", CARDS, ids="sm_{}".format)
@pytest.mark.parametrize("variant", SLOPES, ids=str)
def test_slopes_use_the_matrix_units_and_hardly_spill(
    variant: Variant, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launches = slope_launches(monkeypatch, variant)
    assert len(launches) == max(1, variant.teachers)
    for kernel, launch in launches:
        made = compiled(kernel, launch, capability, tmp_path)
        assert CARDS[capability].product in made.ptx
        assert made.shared <= CARDS[capability].shared
        assert made.spilled <= SPILLED["slope", capability]


@pytest.mark.parametrize(
    "variant", [Variant(rows=129, widths=(200, 37)), Variant(dtype=torch.float32), Variant(dtype=torch.float16, static=True)], ids=str
)
def test_ragged_shapes_and_other_dtypes_compile(variant: Variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launches = statistics_launches(monkeypatch, variant)[:1] + slope_launches(monkeypatch, variant)
    for kernel, launch in launches:
        made = compiled(kernel, launch, 90, tmp_path)
        assert made.shared <= CARDS[90].shared
        # Exact float32 products are for the CUDA cores: the matrix units would round their operands to tf32.
        assert ("wgmma.mma_async" in made.ptx) is (variant.dtype != torch.float32)
