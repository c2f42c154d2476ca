"""What the losses of this package take and return, and how it is checked before any large work, on several ranks together.

A rank that raised by itself would leave the others waiting for it in the next collective, for ever or until the group's time limit; and
ranks that were asked for different things would enter different collectives, which ends in a hang or an abort.

Legend: B local rows (pairs on this rank), D embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megakd_kernels.distributed import Ranks


class Pair(Protocol):
    """Anything that carries one model's embeddings of B image-text pairs; row i of `image` belongs to row i of `text`."""

    @property
    def image(self) -> Tensor:
        """(B, D), L2-normalised by the caller."""

    @property
    def text(self) -> Tensor:
        """(B, D), L2-normalised by the caller."""

    @property
    def scale(self) -> Tensor:
        """() or (1,), multiplies the cosine ("temperature" would divide)."""


class SimilarityLoss(NamedTuple):
    """Two scalars over the same similarity matrix; a part that was not asked for is 0 without a gradient."""

    kd: Tensor
    hard: Tensor


class Towers(NamedTuple):
    """A `Pair` past the door: checked, contiguous, `scale` of shape (). What the backends receive."""

    image: Tensor
    text: Tensor
    scale: Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, otherwise float32: logits and statistics are never kept in half precision."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


Facts = Mapping[str, Any]
"""What must be alike on every rank, by the name that a message calls it; values that compare by their repr."""


def _shapes(name: str, pair: Pair) -> str:
    return f"{name}.image {tuple(pair.image.shape)}, {name}.text {tuple(pair.text.shape)}"


def _check_pair(name: str, pair: Pair) -> None:
    if pair.image.ndim != 2 or pair.image.shape != pair.text.shape:
        raise ValueError(f"image and text must be matrices of one shape (rows, width), got {_shapes(name, pair)}")
    if 0 in pair.image.shape:
        raise ValueError(f"the batch is empty: {_shapes(name, pair)}")
    if pair.scale.numel() != 1:
        raise ValueError(f"{name}.scale must hold one number, got shape {tuple(pair.scale.shape)}")
    tensors = {"image": pair.image, "text": pair.text, "scale": pair.scale}
    odd = [f"{name}.{key} is {tensor.dtype}" for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if odd:
        raise ValueError(f"embeddings and scale must be floating point: {', '.join(odd)}")
    places = {f"{name}.{key}": tensor.device for key, tensor in tensors.items()}
    if pair.image.device != pair.text.device or pair.scale.device not in (pair.image.device, torch.device("cpu")):
        raise ValueError(f"embeddings and scale must be on one device, got {', '.join(f'{key} on {at}' for key, at in places.items())}")


def facts_of_pairs(student: Pair, teachers: Sequence[Pair]) -> Facts:
    """Raises ValueError for pairs that are faulty by themselves or do not fit each other; returns what all ranks must have alike."""
    _check_pair("student", student)
    for place, teacher in enumerate(teachers):
        name = "teacher" if len(teachers) == 1 else f"teacher[{place}]"
        _check_pair(name, teacher)
        if len(teacher.image) != len(student.image):
            raise ValueError(f"student and teacher must hold the same pairs, got {_shapes('student', student)}, {_shapes(name, teacher)}")
        if teacher.image.device != student.image.device:
            raise ValueError(f"student and teacher must be on one device, got {student.image.device} and {teacher.image.device}")
    return {
        "rows": len(student.image),
        "number of teachers": len(teachers),
        "widths of student and teachers": [pair.image.shape[1] for pair in (student, *teachers)],
        "dtypes of image, text and scale": [_dtypes(pair.image, pair.text, pair.scale) for pair in (student, *teachers)],
        "gradients of the student's image, text and scale": wanted(student.image, student.text, student.scale),
        "device": student.image.device.type,
    }


def _dtypes(*tensors: Tensor) -> list[str]:
    return [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]


def wanted(*inputs: Tensor) -> tuple[bool, ...]:
    """Which of the inputs need a gradient. Asked before autograd.Function hides the grad mode."""
    return tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs)


def agree(examine: Callable[[], Facts], ranks: Ranks, student: Pair) -> None:
    """Raise on every rank where `examine` raises on any of them, or where what it returns differs between them.

    One small exchange; a second one, of the texts that the message shows, where something differs. Every rank must call it. Raises what
    `examine` raised on the rank itself, and ValueError on the others. student: shows the device that the group speaks for.
    """
    device = getattr(getattr(student, "image", None), "device", torch.device("cpu"))
    facts: Facts = {}
    fault: Exception | None = None
    try:
        facts = examine()
    except Exception as error:
        fault = error
    if ranks.world > 1:
        known = {name: repr(value) for name, value in facts.items()}
        table = ranks.exchange([int(fault is not None), _digest(sorted(known)), _digest(sorted(known.items()))], device)
        faulty = [rank for rank, (is_faulty, *_) in enumerate(table) if is_faulty]
        if fault is None and faulty:
            raise ValueError(f"rank {faulty[0]} was given faulty arguments or embeddings; its own error says what is wrong")
        if fault is None and len({names for _, names, _ in table}) > 1:
            raise ValueError("the ranks compute different losses: every rank must call the same one")
        if fault is None and len({values for *_, values in table}) > 1:
            raise ValueError(_difference(known, ranks, device))
    if fault is not None:
        raise fault


def _digest(known: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(known).encode(), digest_size=7).digest(), "big")


def _difference(known: Mapping[str, str], ranks: Ranks, device: torch.device) -> str:
    """What differs between the ranks, each named once with every rank's value. A collective."""
    parts = []
    longest = max(max(len(value.encode()) for value in known.values()), 1)
    longest = max(row[0] for row in ranks.exchange([longest], device))
    for name, value in sorted(known.items()):  # the same names on every rank that came here
        table = ranks.exchange(list(value.encode().ljust(longest)), device)
        values = [bytes(row).decode().strip() for row in table]
        if len(set(values)) > 1:
            parts.append(f"{name}: " + ", ".join(f"{each} on rank {rank}" for rank, each in enumerate(values)))
    return "every rank must compute the same loss of as many pairs; these differ: " + "; ".join(parts)
