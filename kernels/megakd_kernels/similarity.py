"""The softmax losses over the similarity matrix: `similarity_kd` and its hard part alone, `contrastive`.

Legend: B rows of this rank, N rows of all ranks, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd_kernels.dispatch import choose, two_pass_kernels
from megakd_kernels.distributed import Facts, Ranks, agree
from megakd_kernels.eager import eager
from megakd_kernels.precision import full_precision
from megakd_kernels.two_pass import TwoPass, two_pass
from megakd_kernels.types import CheckedPair, Pair, SimilarityLoss, check_pairs, compute_dtype, device_of


def _check_arguments(temperature: float, directions: tuple[float, float], scale_limit: float | None) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not all(0 <= weight < math.inf for weight in directions) or not any(directions):
        raise ValueError(f"directions, the weights of rows and columns, must be finite, not negative and not both 0, got {directions}")
    if scale_limit is not None and not 0 < scale_limit < math.inf:
        raise ValueError(f"scale_limit must be positive and finite, or None for unknown, got {scale_limit}")


def _checked(pair: Pair) -> CheckedPair:
    """Where image and text differ in precision, both take the wider one."""
    dtype = torch.promote_types(pair.image.dtype, pair.text.dtype)
    return CheckedPair(pair.image.to(dtype), pair.text.to(dtype), pair.scale.reshape(()))


def similarity_kd(
    student: Pair,
    teacher: Pair | list[Pair] | None,
    *,
    temperature: float = 1.0,
    hard: bool = False,
    directions: tuple[float, float] = (0.5, 0.5),
    scale_limit: float | None = None,
    group: ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
    chunk: int | None = None,
) -> SimilarityLoss:
    """Mean KL(teacher || student) over the rows and columns of the similarity matrix; with `hard` also InfoNCE of the same logits.

    a = student.scale * student.image @ student.text.T, (N, N), N the pairs of all ranks; b likewise of the teacher.
    kd   = temperature^2 / N * sum over rows and columns of weight * KL(softmax(b / temperature) || softmax(a / temperature)).
    hard = -1 / N * sum over rows and columns of weight * log softmax(a)[i, i], at temperature 1 whatever `temperature` is.
    weight is directions[0] for rows (image to text) and directions[1] for columns (text to image).
    One pass yields both: the student's product is formed once. The weights of the two in a total are the caller's.

    student, teacher: image (B, D), text (B, D), scale () or (1,), floating point of any width; the teacher's D may differ.
    Several teachers, each with its own D and scale, come as a list: kd is then the mean of their divergences, as in MobileCLIP
    (arXiv 2311.17049). Its gradient is that of the divergence from their averaged softmaxes; its value is larger by how much the
    teachers disagree, which no student can change. Without a teacher kd is 0. Where teacher and student hold the same numbers
    kd is exactly 0.
    Returns float32 scalars, float64 where an input is float64; logits, statistics and sums are kept in the same dtype,
    whatever the inputs' precision and whatever autocast says.

    Gradients flow to student.image, student.text and student.scale, each only where it requires one; the teacher gets none.
    A second derivative (create_graph=True) raises RuntimeError, except with eager on one process. Deterministic: the same inputs
    give the same bits.

    group: None is this process alone, even where torch.distributed runs. With a group each rank passes its own B pairs (as many
    on every rank), N = B * world, and every rank gets the loss of the whole batch. Gradients are scaled for data-parallel
    averaging: their MEAN over ranks is the gradient of the global loss. So the embeddings' gradients are `world` times their
    share, and so is the scale's, which covers the rank's own rows: do not sum it over ranks on top. Every rank must call
    forward and backward, with the same arguments and the same upstream gradient.
    ring: pass the texts around the ranks block by block, at work meanwhile, instead of gathering them all: for a batch whose
    embeddings and their gradients, N (2 D + D_teacher) numbers, do not fit beside the rest, or for slow links.

    backend: one of `dispatch.BACKENDS`. "eager" is plain autograd over N x N logits, "compiled" the same under torch.compile,
    "chunked" panels of `chunk` rows (tiles on a CPU), never N x N, "triton" the fused CUDA kernels; "auto" follows `dispatch.TABLE`.
    chunk: rows of a panel or tile; None for those of the device, `panels.PANEL_BYTES` or `two_pass_torch.CPU_ROWS`.
    scale_limit: a number that the caller knows no scale of student or teacher to exceed (CLIP clamps its own at 100). Where
    scale_limit / temperature is small enough, Triton needs no running maxima. A broken promise gives inf or nan, not a wrong number.

    Raises ValueError for an argument out of range, a backend that is unknown or cannot run here, and pairs of unequal shape; on
    several ranks a fault of one rank raises on all. Nothing waits for the device, save that check in a group that does not speak
    for the CPU.
    Source: CRD of CLIP-KD (arXiv 2307.12732), eq. 5; affinity mimicking of TinyCLIP (arXiv 2309.12314).
    """
    ranks = Ranks.of(group)
    given = [] if teacher is None else teacher if isinstance(teacher, list) else [teacher]

    def check() -> Facts:
        _check_arguments(temperature, directions, scale_limit)
        facts = check_pairs(student, given)
        loss, pairs = "similarity_kd" if given else "contrastive", len(student.image) * ranks.world
        sides = [side for pair in (student, *given) for side in (pair.image, pair.text)]
        dtype = compute_dtype(*sides, *(pair.scale for pair in (student, *given)))
        halves = all(side.dtype.itemsize == 2 for side in sides)
        chosen = choose(loss, pairs, student.image.device, dtype, halves=halves, backend=backend, ring=ring, chunk=chunk)
        options = {"temperature": temperature, "hard": hard, "directions": directions, "scale_limit": scale_limit, "ring": ring}
        return {**facts, **options, "backend": chosen}

    chosen = agree(check, ranks, device_of(student))["backend"]
    checked = _checked(student)
    teachers = tuple(CheckedPair(*(tensor.detach() for tensor in _checked(each))) for each in given)
    dtype = compute_dtype(*checked, *(tensor for pair in teachers for tensor in pair))
    rows, device = len(checked.image), checked.image.device
    with full_precision(device):
        if chosen in ("eager", "compiled"):
            compiled = chosen == "compiled"
            return eager(checked, teachers, temperature=temperature, hard=hard, directions=directions, ranks=ranks, compiled=compiled)
        columns = rows if ring else rows * ranks.world
        bound = None if scale_limit is None else scale_limit / temperature
        kernels = two_pass_kernels(chosen, rows, columns, device, dtype, chunk, bound)
        return two_pass(checked, teachers, TwoPass(temperature, hard, directions, kernels, ranks, ring))


def contrastive(
    student: Pair,
    *,
    scale_limit: float | None = None,
    group: ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
    chunk: int | None = None,
) -> Tensor:
    """Symmetric InfoNCE of the batch, a scalar: the `hard` part of `similarity_kd` alone, see there for everything else.

    Source: CLIP (arXiv 2103.00020).
    """
    return similarity_kd(student, None, hard=True, scale_limit=scale_limit, group=group, ring=ring, backend=backend, chunk=chunk).hard
