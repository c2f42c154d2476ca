"""Inputs are judged before any large work, and on several ranks together: a fault of one rank raises on all of them."""

from __future__ import annotations

from collections.abc import Sequence

from megakd_kernels.contract import Pair
from megakd_kernels.ranks import Ranks


def _shapes(name: str, pair: Pair) -> str:
    return f"{name}.image {tuple(pair.image.shape)}, {name}.text {tuple(pair.text.shape)}"


def _fault_of_pair(name: str, pair: Pair) -> str | None:
    if pair.image.ndim != 2 or pair.image.shape != pair.text.shape:
        return f"image and text must be matrices of one shape (rows, width), got {_shapes(name, pair)}"
    if 0 in pair.image.shape:
        return f"the batch is empty: {_shapes(name, pair)}"
    if pair.scale.numel() != 1:
        return f"{name}.scale must hold one number, got shape {tuple(pair.scale.shape)}"
    tensors = {"image": pair.image, "text": pair.text, "scale": pair.scale}
    odd = [f"{name}.{key} is {tensor.dtype}" for key, tensor in tensors.items() if not tensor.is_floating_point()]
    return f"embeddings and scale must be floating point: {', '.join(odd)}" if odd else None


def _fault(student: Pair, teachers: Sequence[Pair]) -> str | None:
    """What is wrong with this rank's inputs, in a sentence; None when nothing is."""
    fault = _fault_of_pair("student", student)
    for place, teacher in enumerate(teachers):
        name = "teacher" if len(teachers) == 1 else f"teacher[{place}]"
        fault = fault or _fault_of_pair(name, teacher)
        if fault is None and len(teacher.image) != len(student.image):
            fault = f"student and teacher must hold the same pairs, got {_shapes('student', student)}, {_shapes(name, teacher)}"
    return fault


def check_pairs(student: Pair, teachers: Sequence[Pair], ranks: Ranks) -> None:
    """Raise ValueError on every rank when the inputs of any rank are faulty, or differ in rows or width between ranks.

    The faulty rank takes part in the exchange before it raises: otherwise the others would wait for it for ever. All ranks must
    name as many teachers.
    """
    fault = _fault(student, teachers)
    sizes = [-1] * (2 + len(teachers)) if fault else [*student.image.shape, *(teacher.image.shape[1] for teacher in teachers)]
    table = ranks.exchange(sizes, student.image.device)
    if fault:
        raise ValueError(fault)
    faulty = [rank for rank, row in enumerate(table) if row[0] < 0]
    if faulty:
        raise ValueError(f"rank {faulty[0]} was given faulty embeddings; its own error names the shapes")
    if any(row != table[0] for row in table):
        listed = "; ".join(f"rank {rank}: {', '.join(map(str, row))}" for rank, row in enumerate(table))
        raise ValueError(f"every rank must hold as many pairs of the same widths; rows, student width, teacher widths are {listed}")
