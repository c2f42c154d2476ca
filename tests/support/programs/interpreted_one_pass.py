"""Runs the triton backend of both losses on the CPU for `test_triton_one_pass`.

TRITON_INTERPRET=1 python interpreted_one_pass.py OUT
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from megakd_kernels.one_pass import BiasedLogits
from megakd_kernels.panels import Logits
from support.loss_cases import Batch, Case, batch, measure
from support.one_pass_cases import CASES, LOSSES, case_of

HALVES = (torch.bfloat16, torch.float16)


def accuracy_cases() -> dict[tuple, tuple[Case, int]]:
    """The cases of the accuracy tests with fewer than 100 pairs, each with its chunk, and one with 69 of its 129, two blocks of 64 columns.

    A row takes the interpreter some milliseconds.
    """
    smaller = {129: 69}
    return {
        (loss, number, str(dtype)): (case_of(loss, (smaller.get(pairs, pairs), *shape), dtype), 27 if pairs in smaller else chunk)
        for loss in LOSSES
        for number, (pairs, *shape, chunk) in enumerate(CASES[loss])
        for dtype in (torch.float32, *HALVES)
        if pairs < 100 or (pairs == 129 and shape[0] == 512 and dtype == torch.float32)
    }


def pair_of(a: float, b: float) -> Case:
    """One pair whose logits are a and b."""
    one = torch.ones(1, 1)
    student, teacher = (Batch(one, one, torch.tensor(0.0), torch.tensor(bias)) for bias in (a, b))
    return Case("sigmoid", student, (teacher,))


SIZES = [(a * size, b * size) for size in (5.0, 80.0, 3000.0) for a in (-1, 0, 0.9, 1) for b in (-1, -0.9, 0, 1)]


def twins() -> list[Case]:
    twin = batch(65, 64, 117.0, -16.0)
    return [Case("sigmoid", twin, (twin,) * teachers) for teachers in (1, 3)]


def _plain_products(logits: Logits, rows: slice, out_cM: Tensor) -> None:
    torch.mm(logits.left_BD[rows].float(), logits.right_ND.float().T, out=out_cM)


def slopes(dtype: torch.dtype, diagonal: int | None, widened: bool) -> list[Tensor]:
    """The kernels' panels where products take `dtype`, and the same in float32 of the same numbers."""
    from megakd_kernels.triton.one_pass import TritonOnePass

    student, teacher = batch(40, 48, 50.0, dtype=dtype, seed=1), batch(40, 64, 80.0, dtype=dtype, seed=2)
    made = [Logits(each.image[:23], each.text, each.scale) for each in (student, teacher)]
    if widened:
        made = [Logits(left.float(), right.float(), gain) for left, right, gain in made]
    matrices = [BiasedLogits(logits, torch.tensor(-10.0)) for logits in made]
    kernels = TritonOnePass(9)
    found = [each.exp_cM.clone() for each in kernels.exp_panels(made[0], diagonal, torch.full((23,), -5.0), True)]
    for _, parts in kernels.sigmoid_panels(matrices[0], matrices[1:] * 2, diagonal, True, True):
        found += [part.slope_cM.clone() for part in parts]
    return found


def _results() -> dict[str, object]:
    from megakd_kernels.triton import one_pass as triton_one_pass  # here: the tests take the cases above without Triton

    triton_one_pass.COLUMNS = 64  # more than one block a row
    found: dict[str, object] = {}
    found["accuracy"] = {name: measure(case, backend="triton", chunk=chunk) for name, (case, chunk) in accuracy_cases().items()}
    found["sizes"] = [measure(pair_of(*sizes), backend="triton") for sizes in SIZES]
    found["twins"] = [measure(case, backend="triton", chunk=20) for case in twins()]
    found["again"] = [measure(case, backend="triton", chunk=20) for case in twins()]
    plain, triton_one_pass._cosines = triton_one_pass._cosines, _plain_products
    found["slopes"] = {
        (str(dtype), diagonal): [slopes(dtype, diagonal, widened) for widened in (False, True)]
        for dtype in HALVES
        for diagonal in (None, 12)
    }
    triton_one_pass._cosines = plain
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(_results(), sys.argv[1])
