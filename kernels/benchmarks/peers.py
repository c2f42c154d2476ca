"""Losses of other packages, where they are installed, to be measured beside ours.

Each peer returns a function of student and teacher for the name of a loss, or raises `Unavailable` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LossInputs(NamedTuple):
    """One model's embeddings of N pairs, as `megakd_kernels.Pair`, with the bias of the sigmoid losses."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor

    def leaves(self) -> LossInputs:
        """The same numbers as leaves that require gradients; nothing is copied."""
        return LossInputs(*(tensor.detach().requires_grad_() for tensor in self))


Function = Callable[[LossInputs, LossInputs], Tensor]


class Unavailable(Exception):
    """This implementation does not have this loss, or does not exist on this machine; the message is the reason."""


def open_clip(loss: str) -> Function:
    """open_clip's ClipLoss and DistillClipLoss, the eager losses that most CLIP training uses."""
    try:
        from open_clip.loss import ClipLoss, DistillClipLoss
    except ImportError as error:
        raise Unavailable("open_clip is not installed") from error
    if loss == "contrastive":
        infonce = ClipLoss()
        return lambda student, teacher: _autocast(infonce, student)
    distil = DistillClipLoss()
    return lambda student, teacher: sum(_autocast(distil, student, teacher))


def _autocast(module: torch.nn.Module, *pairs: LossInputs) -> Tensor:
    image = pairs[0].image
    with torch.autocast(image.device.type, image.dtype, enabled=image.is_cuda):
        return module(*(tensor for pair in pairs for tensor in pair[:3]))


def inf_cl(loss: str) -> Function:
    """Inf-CL's Triton InfoNCE (arXiv 2410.17243), once for the rows and once for the columns as its authors use it."""
    if not torch.cuda.is_available():
        raise Unavailable("inf_cl needs a CUDA device")
    try:
        from inf_cl import cal_flash_loss
    except ImportError as error:
        raise Unavailable("inf_cl is not installed") from error

    def run(student: LossInputs, teacher: LossInputs) -> Tensor:
        sides = (student.image, student.text), (student.text, student.image)
        return sum(cal_flash_loss(left, right, scale=student.scale).mean() for left, right in sides) / 2

    return run


def liger(loss: str) -> Function:
    """Liger's fused linear JSD at beta 0, which is KL(teacher || student): the batch's texts stand for the vocabulary."""
    if not torch.cuda.is_available():
        raise Unavailable("liger's kernels need a CUDA device")
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError as error:
        raise Unavailable("liger_kernel is not installed") from error
    fused = LigerFusedLinearJSD(jsd_beta=0.0)

    def run(student: LossInputs, teacher: LossInputs) -> Tensor:
        rows, teacher_rows = ((pair.image * pair.scale).to(pair.image.dtype) for pair in (student, teacher))
        return fused(rows, student.text, teacher_rows, teacher.text, None)

    return run


class Peer(NamedTuple):
    """Which of our losses it has, the function that returns one, and how it differs from ours (stored with its rows)."""

    losses: tuple[str, ...]
    function: Callable[[str], Function]
    note: str


PEERS = {
    "open_clip": Peer(
        ("similarity", "contrastive"),
        open_clip,
        "N x N; under autocast on CUDA, as open_clip trains; KD by cross-entropy, whose gradient is the same",
    ),
    "inf_cl": Peer(("contrastive",), inf_cl, "one call a direction; converts to float32 and multiplies in tf32"),
    "liger": Peer(
        ("kd",), liger, "rows only: half of the loss (vocabulary: the batch's texts); gradients are computed in the forward pass"
    ),
}
