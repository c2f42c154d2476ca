"""The public losses: their contract and the choice of a backend.

Legend: B local rows, N rows of all ranks, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd_kernels.checks import check_pairs
from megakd_kernels.chunked import chunked
from megakd_kernels.contract import Pair, SimilarityLoss, Towers, compute_dtype
from megakd_kernels.eager import eager
from megakd_kernels.panels import chunk_rows
from megakd_kernels.ranks import Ranks

BACKENDS = ("auto", "chunked", "eager")

# The largest N that "auto" gives to eager, by device type; a device that is not named goes to chunked.
# CPU: tests/kernels/time_backends.py, fp32, widths 256 and 512, one thread of a shared AMD EPYC, torch 2.14.1, ms:
#   N          256   512  1024  1400  2048  4096   8192
#   eager      2.5    14    59   137   276  2284  12506
#   chunked    3.7    19    81   144   342  1395   6128
# Up to 2048 the two change places with the state of the heap (other runs at 2048: eager 236 to 459, chunked 241 to 366); eager holds
# ten N x N matrices, 40 MB at 1024. CUDA: not measured; at 2048 those are 160 MB, and launches outweigh the work.
EAGER_UP_TO = {"cpu": 1024, "cuda": 2048}


def _check_request(temperature: float, backend: str, chunk: int | None) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")
    if chunk is not None and backend == "eager":
        raise ValueError(f"backend 'eager' forms the whole matrix at once and takes no chunk, got chunk={chunk}")


def _towers(pair: Pair) -> Towers:
    return Towers(pair.image, pair.text, pair.scale.reshape(()))


def similarity_kd(
    student: Pair,
    teacher: Pair | None,
    *,
    temperature: float = 1.0,
    hard: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "auto",
    chunk: int | None = None,
) -> SimilarityLoss:
    """Mean KL(teacher || student) over the rows and columns of the similarity matrix; with `hard` also InfoNCE of the same logits.

    a = student.scale * student.image @ student.text.T, (N, N), N the pairs of all ranks; b likewise of the teacher.
    kd   = temperature^2 / (2 N) * sum over rows and columns of KL(softmax(b / temperature) || softmax(a / temperature)).
    hard = -1 / (2 N) * sum over rows and columns of log softmax(a)[i, i], at temperature 1 whatever `temperature` is.
    One pass yields both: the student's product is formed once. The weights of the two in a total are the caller's.

    student, teacher: image (B, D), text (B, D), scale () or (1,), floating point of any width; the teacher's D may differ.
    Without a teacher kd is 0. Where teacher and student hold the same numbers kd is exactly 0.
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

    backend: "eager" (plain autograd, N x N logits), "chunked" (panels of `chunk` rows by N columns, never N x N) or "auto"
    (`EAGER_UP_TO`; chunked where `chunk` is given). chunk: None fills panels of `panels.PANEL_BYTES`.

    Raises ValueError for a temperature or chunk out of range, an unknown backend, and pairs of unequal shape; on several ranks
    a fault of one rank raises on all. Nothing waits for the device, save that check in a group that does not speak for the CPU.
    Source: CRD of CLIP-KD (arXiv 2307.12732), eq. 5; affinity mimicking of TinyCLIP (arXiv 2309.12314).
    """
    _check_request(temperature, backend, chunk)
    ranks = Ranks.of(group)
    check_pairs(student, teacher, ranks)
    own = _towers(student)
    guide = None if teacher is None else Towers(*(tensor.detach() for tensor in _towers(teacher)))
    rows, device = len(own.image), own.image.device
    columns = rows * ranks.world
    whole = backend == "eager" or (backend == "auto" and chunk is None and columns <= EAGER_UP_TO.get(device.type, 0))
    with torch.autocast(device.type, enabled=False):
        if whole:
            return eager(own, guide, temperature, hard, ranks)
        dtype = compute_dtype(*own, *(guide or ()))
        return chunked(own, guide, temperature, hard, ranks, chunk or chunk_rows(rows, columns, dtype, device))


def contrastive(student: Pair, *, group: ProcessGroup | None = None, backend: str = "auto", chunk: int | None = None) -> Tensor:
    """Symmetric InfoNCE of the batch, a scalar: the `hard` part of `similarity_kd` alone, see there for everything else.

    Source: CLIP (arXiv 2103.00020).
    """
    return similarity_kd(student, None, hard=True, group=group, backend=backend, chunk=chunk).hard
