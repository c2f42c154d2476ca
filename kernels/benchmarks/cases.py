"""What is measured: the losses, their ideal work, the batches they see, and who computes them.

Legend: N pairs, D width, d_s and d_t the widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from peers import PEERS, LossInputs, Unavailable
from torch import Tensor
from torch.nn.functional import normalize

import megakd_kernels

# "triton_static" is backend "triton" told a limit of the scales that lets it do without running maxima; the others are told CLIP's clamp.
OURS = ("auto", "triton", "triton_static", "chunked", "compiled", "eager")
IMPLEMENTATIONS = (*OURS, *PEERS)
PASSES = ("forward", "backward", "both")

# exp of CLIP's logit scale in the middle of a training; its clamp is 100. SigLIP's bias starts at -10.
SCALE, BIAS = 50.0, -10.0
SCALE_LIMITS = {"triton_static": SCALE}
CLAMP = 100.0


def embeddings(pairs: int, width: int, device: torch.device, dtype: torch.dtype, seed: int) -> LossInputs:
    """Pairs that agree about as far as a trained CLIP's: the matching cosine stands out of the noise. Drawn on the device itself."""
    generator = torch.Generator(device).manual_seed(seed)
    image, noise = (normalize(torch.randn(pairs, width, generator=generator, device=device), dim=-1) for _ in range(2))
    text = normalize(0.3 * image + noise, dim=-1)
    scale, bias = (torch.tensor(value, device=device) for value in (SCALE, BIAS))
    return LossInputs(image.to(dtype), text.to(dtype), scale, bias)


class Work(NamedTuple):
    """Ideal floating-point operations over N^2, as factors of d_s and d_t."""

    forward: tuple[int, int]
    both: tuple[int, int]


class Loss(NamedTuple):
    """public: what `megakd_kernels.choose` knows it by."""

    title: str
    public: str
    work: Work
    compute: Callable[[LossInputs, LossInputs, str, float], Tensor]
    has_maxima: bool = True
    teacher_width_only: bool = False

    def student_width(self, student_width: int, teacher_width: int) -> int:
        """Where student meets teacher in one product, the student has been projected to the teacher's width."""
        return teacher_width if self.teacher_width_only else student_width


def _similarity(student: LossInputs, teacher: LossInputs, backend: str, scale_limit: float) -> Tensor:
    loss = megakd_kernels.similarity_kd(student, teacher, hard=True, backend=backend, scale_limit=scale_limit)
    return loss.kd + loss.hard


def _kd(student: LossInputs, teacher: LossInputs, backend: str, scale_limit: float) -> Tensor:
    return megakd_kernels.similarity_kd(student, teacher, backend=backend, scale_limit=scale_limit).kd


def _contrastive(student: LossInputs, teacher: LossInputs, backend: str, scale_limit: float) -> Tensor:
    return megakd_kernels.contrastive(student, backend=backend, scale_limit=scale_limit)


def _interactive(student: LossInputs, teacher: LossInputs, backend: str, scale_limit: float) -> Tensor:
    return megakd_kernels.interactive_kd(student, teacher, backend=backend)


def _sigmoid(student: LossInputs, teacher: LossInputs, backend: str, scale_limit: float) -> Tensor:
    return megakd_kernels.sigmoid_kd(student, teacher, hard=False, backend=backend).kd


# The least that is possible without keeping an N x N matrix (kernels/README.md). A product of (N, d) by (d, N) is 2 N^2 d; the softmax
# losses form the student's and the teacher's logits twice (2 + 2 of each d) and two gradient products (2 + 2 of d_s). Sigmoid needs one
# pass over the logits. Interactive has two directions with complete rows: logits once and the product with the anchors, 4 d each.
LOSSES = {
    "similarity": Loss("similarity KD + InfoNCE", "similarity_kd", Work((2, 2), (8, 4)), _similarity),
    "kd": Loss("similarity KD", "similarity_kd", Work((2, 2), (8, 4)), _kd),
    "contrastive": Loss("InfoNCE", "contrastive", Work((2, 0), (8, 0)), _contrastive),
    "interactive": Loss("interactive KD", "interactive_kd", Work((4, 0), (8, 0)), _interactive, has_maxima=False, teacher_width_only=True),
    "sigmoid": Loss("sigmoid KD", "sigmoid_kd", Work((2, 2), (6, 2)), _sigmoid, has_maxima=False),
}
# The peers that compute less than the loss they are listed under, with the work they need.
PARTIAL_WORK = {"liger": Work((2, 2), (6, 2))}
# Whole float32 matrices that live at once, to foresee that they do not fit (measured on the CPU at N = 1024, see results/).
MATRICES = {"eager": 10, "compiled": 5, "open_clip": 11}


class LossCase(NamedTuple):
    """One implementation of one loss at one size."""

    loss: str
    pairs: int
    student_width: int
    teacher_width: int
    implementation: str

    def flops(self, passes: str) -> int:
        """Ideal operations of "forward", "backward" or "both"."""
        work = PARTIAL_WORK.get(self.implementation, LOSSES[self.loss].work)
        forward, both = (self.pairs**2 * (s * self.student_width + t * self.teacher_width) for s, t in work)
        return {"forward": forward, "backward": both - forward, "both": both}[passes]

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[LossInputs, LossInputs]:
        """Student, whose tensors are leaves that require gradients, and teacher."""
        widths = self.student_width, self.teacher_width
        student, teacher = (embeddings(self.pairs, width, device, dtype, seed) for seed, width in enumerate(widths))
        return student.leaves(), teacher

    def function(self) -> Callable[[LossInputs, LossInputs], Tensor]:
        """Raises `Unavailable` with the reason where this implementation does not exist here."""
        if self.implementation in PEERS:
            return PEERS[self.implementation].function(self.loss)
        compute, backend = LOSSES[self.loss].compute, self.implementation.removesuffix("_static")
        scale_limit = SCALE_LIMITS.get(self.implementation, CLAMP)
        if backend == "compiled":
            # a program for each loss, size and width; past the default of 8 nothing is compiled, silently
            torch.compiler.config.recompile_limit = 256

        def run(student: LossInputs, teacher: LossInputs) -> Tensor:
            # Asked beforehand: an error of the loss itself is a failure, and must not pass for a backend that is not there.
            try:
                megakd_kernels.choose(LOSSES[self.loss].public, self.pairs, student.image.device, torch.float32, backend=backend)
            except ValueError as error:
                raise Unavailable(str(error)) from error
            return compute(student, teacher, backend, scale_limit)

        return run

    @property
    def compiles(self) -> bool:
        """Whether the first call at a size may translate a program: that call's time and memory are not the loss's own."""
        return self.implementation not in ("eager", "chunked", "open_clip")

    @property
    def exists(self) -> bool:
        """Whether the implementation claims to have this loss."""
        if self.implementation in PEERS:
            return self.loss in PEERS[self.implementation].losses
        return self.implementation not in SCALE_LIMITS or LOSSES[self.loss].has_maxima

    @property
    def matrix_bytes(self) -> int:
        """About what the implementations that store N x N matrices hold at once; 0 for the others."""
        return MATRICES.get(self.implementation, 0) * self.pairs**2 * torch.float32.itemsize
