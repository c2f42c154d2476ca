"""What the losses take and return, and the checks of their arguments.

Legend: B rows of this rank (its pairs), D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megakd_kernels.distributed import Facts


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


class BiasedPair(Pair, Protocol):
    """A `Pair` whose logits also carry a bias, as SigLIP's do."""

    @property
    def bias(self) -> Tensor | None:
        """() or (1,), added to scale * cosine; None counts as 0."""


class SimilarityLoss(NamedTuple):
    """Two scalars over the same similarity matrix; a part that was not asked for is 0 without a gradient."""

    kd: Tensor
    hard: Tensor


class CheckedPair(NamedTuple):
    """A `Pair` as the backends take it: checked, `scale` of shape ()."""

    image: Tensor
    text: Tensor
    scale: Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, otherwise float32: logits and statistics are never kept in half precision."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def needs_grad(*inputs: Tensor) -> tuple[bool, ...]:
    """Which of the inputs need a gradient. To be called outside of autograd.Function, which hides the grad mode."""
    return tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in inputs)


def device_of(pair: Pair) -> torch.device:
    """The device of a pair that may still be faulty: the CPU where it has none."""
    return getattr(getattr(pair, "image", None), "device", torch.device("cpu"))


def _shapes(name: str, pair: Pair) -> str:
    return f"{name}.image {tuple(pair.image.shape)}, {name}.text {tuple(pair.text.shape)}"


def _check_pair(name: str, pair: Pair) -> None:
    if pair.image.ndim != 2 or pair.image.shape != pair.text.shape:
        raise ValueError(f"image and text must be matrices of one shape (rows, width), got {_shapes(name, pair)}")
    if 0 in pair.image.shape:
        raise ValueError(f"the batch is empty: {_shapes(name, pair)}")
    if pair.scale.numel() != 1:
        raise ValueError(f"{name}.scale must hold one number, got shape {tuple(pair.scale.shape)}")
    tensors = {f"{name}.image": pair.image, f"{name}.text": pair.text, f"{name}.scale": pair.scale}
    integral = [f"{key} is {tensor.dtype}" for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if integral:
        raise ValueError(f"embeddings and scale must be floating point: {', '.join(integral)}")
    if pair.image.device != pair.text.device or pair.scale.device not in (pair.image.device, torch.device("cpu")):
        devices = ", ".join(f"{key} on {tensor.device}" for key, tensor in tensors.items())
        raise ValueError(f"embeddings and scale must be on one device, got {devices}")


def check_pairs(student: Pair, teachers: Sequence[Pair]) -> Facts:
    """Raises ValueError for a faulty pair and for pairs that do not fit each other; returns what must be equal on all ranks."""
    _check_pair("student", student)
    for number, teacher in enumerate(teachers):
        name = "teacher" if len(teachers) == 1 else f"teacher[{number}]"
        _check_pair(name, teacher)
        if len(teacher.image) != len(student.image):
            raise ValueError(f"student and teacher must hold the same pairs, got {_shapes('student', student)}, {_shapes(name, teacher)}")
        if teacher.image.device != student.image.device:
            raise ValueError(f"student and teacher must be on one device, got {student.image.device} and {teacher.image.device}")
    tensors = [(pair.image, pair.text, pair.scale) for pair in (student, *teachers)]
    return {
        "rows": len(student.image),
        "number of teachers": len(teachers),
        "widths of student and teachers": [image.shape[1] for image, _, _ in tensors],
        "dtypes of image, text and scale": [[str(tensor.dtype).removeprefix("torch.") for tensor in each] for each in tensors],
        "gradients of the student's image, text and scale": needs_grad(*tensors[0]),
        "device": student.image.device.type,
    }
