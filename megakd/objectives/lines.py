"""The lines of the similarity matrix, its rows and its columns, for losses that compare a student's with a teacher's line by line.

A column of the matrix is a row of its transpose. So each rank forms the rows of its own images among all texts and the columns of its own
texts among all images: every line is whole on one rank, whatever is computed of it, and no statistic is merged. Large matrices are never
stored: lines are formed some at a time, and again in the backward pass.

Legend: B pairs of this rank, N of all ranks, D width, c lines of a panel. "Across": each of the N lines that cross one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from megakd.models.embeddings import Embeddings
from megakd.objectives import cost
from megakd.objectives.base import Objective, StepContext, kernel_options
from megakd.objectives.cost import LineFamily, LossCost, LossShape
from megakd.recipe import Recipe
from megakd.recipe.objectives import ObjectiveSections
from megakd_kernels.distributed import Ranks, add_parts, agree, gather_for_parts
from megakd_kernels.panels import chunk_rows, chunks
from megakd_kernels.precision import product
from megakd_kernels.types import check_pairs, compute_dtype


def by_panels(panel: Callable[[slice], Tensor], rows: int, chunk: int | None) -> Tensor:
    """panel(part) for parts of `chunk` of the `rows`, one after the other in the first dimension.

    What `panel` makes inside is freed at once and made again in the backward pass, one part at a time. chunk None: one part, and kept.
    """
    if chunk is None:
        return panel(slice(0, rows))
    return torch.cat([checkpoint(panel, part, use_reentrant=False, preserve_rng_state=False) for part in chunks(rows, chunk)])


def unit_about_mean(values_cN: Tensor) -> Tensor:
    """Each line less its mean, at length 1. A line of equal numbers, but for their rounding, becomes 0 and gets no gradient."""
    centred_cN = values_cN - values_cN.mean(1, keepdim=True)
    length_c1 = torch.linalg.vector_norm(centred_cN, dim=1, keepdim=True)
    rounding = 8 * torch.finfo(values_cN.dtype).eps * values_cN.shape[1] ** 0.5
    flat_c1 = length_c1 <= rounding * values_cN.detach().abs().amax(1, keepdim=True)
    unit_cN: Tensor = (centred_cN / length_c1.masked_fill(flat_c1, 1)).masked_fill(flat_c1, 0)
    return unit_cN


class Lines(NamedTuple):
    """This rank's lines of one model's matrix: its images among all texts, or its texts among all images.

    first: the place of the rank's first pair among all: line i has its positive at `first + i`. chunk: lines of a panel, None for all.
    across_N: logsumexp of each line that crosses these, where `Matrix.normalised` has put it.
    """

    own_BD: Tensor
    all_ND: Tensor
    scale: Tensor
    first: int
    chunk: int | None
    across_N: Tensor | None = None

    def cosines(self, part: slice) -> Tensor:
        """(c, N)"""
        return product(self.own_BD[part], self.all_ND)

    def logits(self, part: slice, temperature: float = 1.0) -> Tensor:
        """(c, N), scale * cosine / temperature."""
        return product(self.own_BD[part] * (self.scale / temperature), self.all_ND)

    def log_softmaxes(self, part: slice, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(c, N) each: the logarithm of the softmax along these lines, and of the one along the lines across."""
        assert self.across_N is not None, "only the lines of a normalised matrix know the others' sums"
        logits_cN = self.logits(part, temperature)
        return logits_cN.log_softmax(1), logits_cN - self.across_N

    def positives(self, part: slice) -> Tensor:
        """(c, 1), the column of each line's own pair."""
        return torch.arange(self.first + part.start, self.first + part.stop, device=self.own_BD.device)[:, None]

    def normalisers(self, temperature: float) -> Tensor:
        """(B,), logsumexp of each line."""
        return by_panels(lambda part: self.logits(part, temperature).logsumexp(1), len(self.own_BD), self.chunk)


class Matrix(NamedTuple):
    """Both kinds of lines of one model."""

    rows: Lines
    columns: Lines
    ranks: Ranks

    def normalised(self, temperature: float = 1.0) -> Matrix:
        """The same, in which each line knows the logsumexp of all lines across, whichever rank has them."""
        own = (self.rows.normalisers(temperature), self.columns.normalisers(temperature))
        rows_N, columns_N = (gather_for_parts(own_B, self.ranks, own_B.dtype) for own_B in own)
        return self._replace(rows=self.rows._replace(across_N=columns_N), columns=self.columns._replace(across_N=rows_N))


def match(lines: Lines, part: slice) -> Tensor:
    """(c,), InfoNCE of each line."""
    return -lines.logits(part).log_softmax(1).gather(1, lines.positives(part)).squeeze(1)


def divergence(lines: Lines, of_teacher: Lines, part: slice, temperature: float = 1.0) -> Tensor:
    """(c,), KL(teacher || student) of each line's softmax, times the square of the temperature."""
    log_p_cN, log_q_cN = (one.logits(part, temperature).log_softmax(1) for one in (lines, of_teacher))
    return kl_div(log_p_cN, log_q_cN, reduction="none", log_target=True).sum(1) * temperature**2


def of_pairs(line: Callable[..., Tensor], *matrices: Matrix) -> Tensor:
    """(B,): of each pair the mean of what `line` gives of its row and of its column. line(lines of each matrix, part) gives (c,)."""
    sides = (tuple(matrix.rows for matrix in matrices), tuple(matrix.columns for matrix in matrices))
    rows_B, columns_B = (by_panels(partial(line, *side), len(side[0].own_BD), side[0].chunk) for side in sides)
    return (rows_B + columns_B) / 2


def agreed(context: StepContext) -> tuple[Ranks, torch.dtype]:
    """The ranks of the batch, and what a loss over it is computed in: float32, float64 where an input is.

    Raises ValueError, on every rank, where pairs do not fit each other or between ranks.
    """
    ranks, student, teachers = Ranks.of(context.group), context.student, list(context.teachers)
    agree(lambda: check_pairs(student, teachers), ranks, student.image.device)
    return ranks, compute_dtype(*(tensor for one in (student, *teachers) for tensor in (one.image, one.text, one.scale)))


def between(own: Embeddings, other: Embeddings, ranks: Ranks, dtype: torch.dtype, chunk: int | None) -> Matrix:
    """Own images among the other's texts, and own texts among the other's images, at the own scale; of a model and itself its matrix."""
    image_ND, text_ND = (gather_for_parts(side_BD, ranks, dtype) for side_BD in (other.image, other.text))
    scale, first = own.scale.reshape(()).to(dtype), ranks.rank * len(own.image)
    rows = Lines(own.image.to(dtype), text_ND, scale, first, chunk)
    return Matrix(rows, rows._replace(own_BD=own.text.to(dtype), all_ND=image_ND), ranks)


def matrices(context: StepContext, *, whole: bool) -> tuple[Matrix, list[Matrix]]:
    """Of the student, with a gradient, and of each teacher. whole: keep the matrix instead of forming panels of it twice.

    Raises ValueError as `agreed` does.
    """
    student, (ranks, dtype) = context.student, agreed(context)
    rows = len(student.image)
    chunk = None if whole else chunk_rows(rows, rows * ranks.world, dtype, student.image.device)

    def matrix(of: Embeddings) -> Matrix:
        return between(of, of, ranks, dtype, chunk)

    with torch.no_grad():
        taught = [matrix(teacher) for teacher in context.teachers]
    return matrix(student), taught


class LineObjective(Objective):
    """A loss that is the mean over the N rows and N columns of the similarity matrix, of which each rank computes its own.

    `[kernels]` decides where panels replace the whole matrix, at the same size as for `similarity`. Panels are torch's where it says
    triton, and embeddings are gathered even where it says ring.

    family: what a subclass costs.
    """

    family: LineFamily

    def __init__(self, recipe: Recipe, device: torch.device, names: tuple[str, ...]) -> None:
        super().__init__(recipe, device, names)
        self._recipe, self.of_pairs = recipe, names
        self._whole = kernel_options(recipe, "similarity_kd", device)["backend"] in ("eager", "compiled")
        self.backend = "eager" if self._whole else "chunked"

    def cost(self, shape: LossShape) -> LossCost:
        return cost.of_lines(self.family, self._whole, shape)

    def __call__(self, context: StepContext) -> dict[str, Tensor]:
        (name,) = self.names
        options = self._recipe.section_at(name, context.step) if name in ObjectiveSections.model_fields else None
        student, teachers = matrices(context, whole=self._whole)
        student = self.prepared(student, options)
        losses = []
        for matrix in teachers:
            with torch.no_grad():
                teacher = self.prepared(matrix, options)
            sums = [
                by_panels(partial(self.compare, own, taught, options), len(own.own_BD), own.chunk).sum()
                for own, taught in ((student.rows, teacher.rows), (student.columns, teacher.columns))
            ]
            losses.append(add_parts(sums[0] + sums[1], student.ranks) / (2 * len(student.rows.all_ND)))
        return {name: context.mean(losses)}

    def pairs(self, context: StepContext) -> dict[str, Tensor]:
        (name,) = self.names
        options = self._recipe.section_at(name, context.step) if name in ObjectiveSections.model_fields else None
        own, taught = matrices(context, whole=False)
        student = self.prepared(own, options)

        def line(own: Lines, taught: Lines, part: slice) -> Tensor:
            return self.compare(own, taught, options, part)

        return {name: context.mean_of_pairs([of_pairs(line, student, self.prepared(teacher, options)) for teacher in taught])}

    def prepared(self, matrix: Matrix, options: Any) -> Matrix:
        """What `compare` needs of one model's whole matrix; nothing unless a subclass says otherwise."""
        return matrix

    @abstractmethod
    def compare(self, own: Lines, taught: Lines, options: Any, part: slice) -> Tensor:
        """(c,), the loss of each of these lines of the student's matrix against the same of the teacher's.

        options: the section of the recipe that is named as the objective, as it is in this step; None without one.
        """
        ...
