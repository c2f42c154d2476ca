"""What losses over the similarity matrix cost one rank: memory, traffic and FLOPs, by kernel and backend. `megakd plan` adds them up.

Numbers of matrices and panels were counted by `planning.memory_tracker` on real losses at N = 1024 and 2048; FLOPs are those of
kernels/README.md. Legend: N pairs of all ranks, B of one, c rows of a panel, D student's width, T teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megakd.models.heads import ModelShape
from megakd.runtime import wire
from megakd.runtime.wire import Wire
from megakd_kernels.panels import chunk_rows
from megakd_kernels.two_pass_torch import TorchTwoPass

FP32 = 4
# Of each rank, to all: three integers by which a call of the kernels agrees on what is computed, and the two losses that were added up
AGREED, ADDED = 3 * 8, 2 * FP32
# `PANEL_BYTES` of `megakd_kernels.triton.two_pass` and `SLAB_BYTES` of `megakd_kernels.triton.statistics`, modules that import triton
TRITON_PANEL, TRITON_SCRATCH = 256 << 20, 128 << 20


@dataclass(frozen=True)
class LossFamily:
    """Objectives that one call computes. matrices: N x N of float32 that eager holds at its peak, and further for each teacher but the
    first; panels: (c, N) of chunked.

    eager and blocked: FLOPs over N^2 and over N B, as multiples of the two widths. columns and home: widths of what each column brings
    to other ranks, and of the gradient that returns to it.
    """

    matrices: int
    further: int
    panels: int
    eager: tuple[int, int]
    blocked: tuple[int, int]
    columns: tuple[int, int]
    home: int


SOFTMAX_KD, SOFTMAX_HARD = LossFamily(10, 4, 5, (6, 2), (8, 4), (1, 1), 1), LossFamily(4, 0, 3, (6, 0), (8, 0), (1, 0), 1)
SIGMOID_KD, SIGMOID_HARD = LossFamily(11, 3, 8, (6, 2), (6, 2), (1, 1), 1), LossFamily(5, 0, 4, (6, 0), (6, 0), (1, 0), 1)
SIGMOID_BOTH = LossFamily(11, 3, 8, (6, 2), (10, 2), (1, 1), 2)
INTERACTIVE = LossFamily(4, 2, 1, (0, 8), (0, 8), (0, 2), 0)
TILES = {SOFTMAX_KD: 5, SOFTMAX_HARD: 4}  # of chunked on a CPU, in place of panels


@dataclass(frozen=True)
class LineFamily:
    """A `lines.LineObjective`. whole and panels: (lines, N) of float32 at its peak, where all lines are kept and where they are formed
    again; further: of those kept, for each teacher but the first. forward: FLOPs of a forward pass over N B, as multiples of the widths.
    """

    whole: int
    further: int
    panels: int
    forward: tuple[int, int]


STANDARDISED, DECOUPLED, DIST = LineFamily(9, 6, 6, (4, 4)), LineFamily(11, 8, 6, (4, 4)), LineFamily(23, 14, 14, (8, 8))
GRADIENT = LineFamily(15, 8, 9, (12, 12))
PAIR_PANELS = 9  # (c, N) of float32 that `dist` forms without a gradient; the others 2 to 7


@dataclass(frozen=True)
class LossCost:
    """Of one rank and step: bytes at the peak beside the embeddings, what is sent, FLOPs."""

    memory: int
    wire: Wire
    flops: int


@dataclass(frozen=True)
class LossShape:
    """pairs: N. widths: of the student and of all teachers in sum. elements: bytes of a number of their embeddings.

    models: the student and each teacher.
    """

    pairs: int
    ranks: int
    widths: tuple[int, int]
    elements: tuple[int, int]
    teachers: int
    ring: bool
    device: torch.device
    models: tuple[ModelShape, ...] = ()

    def with_text(self) -> LossShape:
        """The same with those teachers alone that have a text tower."""
        if all(model.has_text for model in self.models):
            return self
        student, *teachers = (model for model in self.models if model.has_text)
        widths = (self.widths[0], sum(teacher.width for teacher in teachers))
        return replace(self, widths=widths, teachers=len(teachers), models=(student, *teachers))


def eager(shape: LossShape) -> LossCost:
    """For a loss that nobody has counted: what KD on softmaxes over the whole matrix costs."""
    return of_kernel(SOFTMAX_KD, "eager", shape)


def rowwise(shape: LossShape) -> LossCost:
    """A loss that compares each embedding with its own teacher's, counted on `feature`: differences and gradients; nothing is sent."""
    local, width = shape.pairs // shape.ranks, shape.widths[1]
    return LossCost(FP32 * local * (2 * width + 3 * width // max(1, shape.teachers)), Wire(), 12 * local * width)


def of_kernel(of: LossFamily, backend: str, shape: LossShape) -> LossCost:
    """A call of `megakd_kernels` with the backend that was chosen for it."""
    pairs, local, ranks = shape.pairs, shape.pairs // shape.ranks, shape.ranks
    both_widths = sum(shape.widths)
    if backend in ("eager", "compiled"):
        matrices = of.matrices + of.further * max(0, shape.teachers - 1) if backend == "eager" else 4 * max(1, shape.teachers)
        # image and text of both models in float32, gathered, and the student's gradients
        sides = 2 * FP32 * pairs * (both_widths + shape.widths[0])
        flops = pairs**2 * _weighted(of.eager, shape.widths)
        sent = wire.gathered(2 * FP32 * pairs * both_widths + AGREED * ranks, ranks, 1 + 2 * (1 + shape.teachers))
        return LossCost(matrices * FP32 * pairs**2 + sides, sent, flops)
    brought = pairs * sum(count * width * element for count, width, element in zip(of.columns, shape.widths, shape.elements, strict=True))
    home = FP32 * pairs * of.home * shape.widths[0]
    # A ring holds two blocks of columns and three of gradients in place of all; a single rank has its columns already.
    standing = (2 * brought + 3 * home) // ranks if shape.ring else brought * (ranks > 1) + home
    own = 2 * FP32 * local * max(shape.widths)
    if backend == "triton":
        columns = local if shape.ring else pairs
        rows = max(1, min(local, TRITON_PANEL // (2 * columns)))
        panels = rows * columns * shape.elements[0] + TRITON_SCRATCH
    else:
        columns = local if shape.ring else pairs
        panels = of.panels * chunk_rows(local, columns, torch.float32, shape.device) * columns * FP32
        if of in TILES and shape.device.type == "cpu":
            tiles = TorchTwoPass.of(local, columns, torch.float32, shape.device, None)
            panels = TILES[of] * tiles.rows * tiles.columns * FP32 + kept(of, backend, shape)
            own = 2 * FP32 * local * shape.widths[0]
    # Each rank tells all columns' statistics over its own rows: two numbers, and three for each teacher; elementwise losses have none.
    two_passes = of in (SOFTMAX_KD, SOFTMAX_HARD)
    statistics = (2 + 3 * shape.teachers * (of is SOFTMAX_KD)) * FP32 * pairs * ranks if two_passes else 0
    sent = wire.gathered(statistics + (AGREED + ADDED) * ranks, ranks, 2 + two_passes)
    if shape.ring and ranks > 1:
        # Each pass brings the columns anew; their gradients make one hop more than they, to come home.
        rounds = 2 if two_passes else 1
        sent += Wire(sent=round(rounds * brought * (ranks - 1) / ranks) + home, calls=rounds)
    else:
        sent += wire.gathered(brought, ranks, sum(of.columns)) + wire.scattered(home, ranks, of.home)
    return LossCost(panels + standing + own + statistics, sent, pairs * local * _weighted(of.blocked, shape.widths))


def kept(of: LossFamily, backend: str, shape: LossShape) -> int:
    """Bytes of logits that a call keeps for its backward pass: of the softmax losses on a CPU."""
    if backend != "chunked" or shape.ring or of not in TILES:
        return 0
    local, teachers = shape.pairs // shape.ranks, shape.teachers if of is SOFTMAX_KD else 0
    tiles = TorchTwoPass.of(local, shape.pairs, torch.float32, shape.device, None)
    widths = [shape.widths[0], *(shape.widths[1] // teachers for _ in range(teachers))]
    return FP32 * tiles.rows * tiles.columns * sum(tiles.kept_tiles(local, shape.pairs, widths))


def by_pair(shape: LossShape) -> int:
    """Bytes of `Objective.pairs` on the steps where it is called: both models' sides in float32, and the panels of the dearest, `dist`."""
    panels = PAIR_PANELS * chunk_rows(shape.pairs // shape.ranks, shape.pairs, torch.float32, shape.device)
    return FP32 * shape.pairs * (panels + 2 * sum(shape.widths))


def of_lines(of: LineFamily, whole: bool, shape: LossShape) -> LossCost:
    """A loss that forms all lines of its own pairs, kept whole or in panels that the backward pass forms again."""
    pairs, local = shape.pairs, shape.pairs // shape.ranks
    student, teachers = shape.widths
    if whole:
        panels = (of.whole + of.further * max(0, shape.teachers - 1)) * local
    else:
        panels = of.panels * chunk_rows(local, pairs, torch.float32, shape.device)
    # image and text of all models in float32, the student's gradients, and what one panel adds to them
    sides = 2 * FP32 * pairs * (student + teachers + student) + FP32 * pairs * student
    forward, backward = _weighted(of.forward, shape.widths), 2 * of.forward[0] * student
    flops = pairs * local * (forward * (1 if whole else 2) + backward)
    return LossCost(panels * FP32 * pairs + sides, _sides(2, shape), flops)


def relational(shape: LossShape, *, modalities: int, distance: bool, angle: bool) -> LossCost:
    """`rkd`, always in panels that the backward pass forms again; distances are formed for their mean too."""
    pairs, local, student = shape.pairs, shape.pairs // shape.ranks, shape.widths[0]
    teacher = shape.widths[1] // max(1, shape.teachers)
    distances = 8 * chunk_rows(local, pairs, torch.float32, shape.device) * pairs
    points = chunk_rows(local, pairs * max(pairs, student, teacher), torch.float32, shape.device)
    lines = chunk_rows(pairs, pairs, torch.float32, shape.device)
    # the losses of the angles, or the gradient of the rays
    angles = points * pairs * max(3 * lines + student + teacher, 2 * lines + 3 * student + 2 * teacher)
    sides = modalities * ((pairs + local) * sum(shape.widths) + 3 * pairs * student)
    forward, backward = 2 * sum(shape.widths), 4 * student
    flops = modalities * local * pairs * (distance * 2 * (2 * forward + backward) + angle * pairs * (2 * forward + backward))
    return LossCost(FP32 * (max(distances * distance, angles * angle) + sides), _sides(modalities, shape), flops)


def one_by_one(of: LossFamily, backend: str, shape: LossShape) -> LossCost:
    """A call of `megakd_kernels` for each teacher, as where their weights differ: the student's product is formed in each.

    Beside the memory of one call: of eager five matrices for each further teacher wait for the backward; else the student's gradients and
    what a softmax loss keeps.
    """
    alone = replace(shape, teachers=1, widths=(shape.widths[0], shape.widths[1] // shape.teachers))
    each, further = of_kernel(of, backend, alone), shape.teachers - 1
    by_panels = further * (of.home * FP32 * shape.pairs * shape.widths[0] + kept(of, backend, alone))
    waiting = 5 * further * FP32 * shape.pairs**2 if backend in ("eager", "compiled") else by_panels
    return LossCost(each.memory + waiting, each.wire.times(shape.teachers), shape.teachers * each.flops)


def _sides(modalities: int, shape: LossShape) -> Wire:
    """Of each modality the embeddings of all models, gathered as they are, and the student's gradients in float32 on their way home."""
    embeddings = shape.pairs * sum(width * element for width, element in zip(shape.widths, shape.elements, strict=True))
    home = wire.scattered(modalities * FP32 * shape.pairs * shape.widths[0], shape.ranks, modalities)
    return wire.gathered(modalities * embeddings, shape.ranks, modalities * (1 + shape.teachers)) + home


def _weighted(counts: tuple[int, int], widths: tuple[int, int]) -> int:
    return sum(count * width for count, width in zip(counts, widths, strict=True))
