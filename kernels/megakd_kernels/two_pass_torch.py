"""The two passes in plain torch, on any device and in float64 too: the logits a tile at a time.

On a CPU three things keep pace with N x N under torch.compile. A tile stays in the cache between its product and what is done to it. Rows
and columns share one exponential. And tiles of logits are kept for the backward pass, as many as take the memory of the embeddings.

Legend: B rows of this rank, M columns of a block, D width, c rows and C columns of a tile, K teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megakd_kernels.panels import Logits, chunk_rows, chunks, scratch_panels
from megakd_kernels.softmax_stats import SLOPE_GAIN, SlopeWeights, SoftmaxStats, join, merge, panel_stats
from megakd_kernels.two_pass import Kept, StripeLogits

# Rows and columns of a tile on a CPU: five of float32 live at once, 1 MB each.
CPU_ROWS, CPU_COLUMNS = 512, 512

# Logits that are kept for the backward pass where the embeddings are fewer numbers: 64 MB of float32, less than long panels would take.
LEAST_KEPT = 16 << 20

# exp(-60). Where a line's sum over a tile, relative to the tile's largest term, is no less, no term that counts was lost below float32's
# smallest number, exp(-87), and the sum has all its digits.
LEAST_SUM = 1e-26


class _Tile(NamedTuple):
    """Tile `number` of a stripe, counted row by row. lefts: (c, D) of each model, the student's first, as `Logits.times` takes them."""

    number: int
    rows: slice
    columns: slice
    models: Sequence[Logits]
    lefts: Sequence[Tensor]

    def inside(self, panel: Tensor) -> Tensor:
        """The part of a whole tile's memory that this one fills: less at the ends of the stripe."""
        return panel[: self.rows.stop - self.rows.start, : self.columns.stop - self.columns.start]

    def formed(self, model: int, kept: Kept, out: Tensor) -> Tensor:
        """(c, C) logits, in their place among the kept ones, or else in `out`."""
        if kept and self.number < len(kept[model]):
            out = kept[model][self.number]
        return self.models[model].times(self.lefts[model], self.columns, self.inside(out))

    def again(self, model: int, kept: Kept, out: Tensor) -> Tensor:
        """The same in the backward pass: not to be written to."""
        if kept and self.number < len(kept[model]):
            return self.inside(kept[model][self.number])
        return self.formed(model, (), out)

    def positives(self, tile_cC: Tensor, diagonal: int | None) -> Tensor | None:
        """A view of the entries where column = row + diagonal; None where there are none."""
        if diagonal is None:
            return None
        first, last = self.columns.start - diagonal, self.columns.stop - diagonal
        if max(self.rows.start, first) >= min(self.rows.stop, last):
            return None
        return tile_cC.diagonal(self.rows.start - first)


def _tiles(models: Sequence[Logits], height: int, width: int) -> Iterator[list[_Tile]]:
    """Row by row."""
    columns = list(chunks(len(models[0].right_ND), width))
    for number, rows in enumerate(chunks(len(models[0].left_BD), height)):
        lefts = [model.scaled_rows(rows) for model in models]
        yield [_Tile(number * len(columns) + place, rows, each, models, lefts) for place, each in enumerate(columns)]


class TorchTwoPass(NamedTuple):
    """`TwoPassKernels` in plain torch. rows, columns: of a tile. on_cpu: values can be read without waiting for a device."""

    rows: int
    columns: int
    on_cpu: bool

    @classmethod
    def of(cls, rows: int, columns: int, dtype: torch.dtype, device: torch.device, chunk: int | None) -> TorchTwoPass:
        """For a stripe of `rows` by blocks of `columns`. chunk: rows of a tile; None for the device's own number."""
        if device.type == "cpu":
            return cls(min(rows, chunk or CPU_ROWS), min(columns, CPU_COLUMNS), on_cpu=True)
        return cls(min(rows, chunk or chunk_rows(rows, columns, dtype, device)), columns, on_cpu=False)

    def logits(self, left_BD: Tensor, right_MD: Tensor, gain: Tensor) -> Logits:
        return Logits.of(left_BD, right_MD, gain)

    def statistics(
        self, logits: StripeLogits, hard_temperature: float | None, keep: bool
    ) -> tuple[SoftmaxStats, SoftmaxStats, Tensor | None, Kept]:
        models = (logits.student, *logits.teachers)
        kept = self._room(models) if keep else ()
        a_panel, *panels = scratch_panels(5 if logits.teachers else 3, self.rows, logits.student, self.columns)
        of_rows: list[SoftmaxStats] = []
        of_columns: SoftmaxStats | None = None
        diagonal_parts: list[Tensor] = []
        for row in _tiles(models, self.rows, self.columns):
            parts: list[tuple[SoftmaxStats, SoftmaxStats]] = []
            for tile in row:
                a_cC, scratch = tile.formed(0, kept, a_panel), [tile.inside(panel) for panel in panels]
                positives_c = tile.positives(a_cC, logits.diagonal)
                if positives_c is not None:
                    diagonal_parts.append(positives_c.clone())
                teachers = [partial(tile.formed, place, kept, panels[-1]) for place in range(1, len(models))]
                stats = _one_reference_stats(a_cC, teachers, hard_temperature, scratch) if self.on_cpu else None
                if stats is None:
                    a_cC = tile.inside(a_panel).copy_(a_cC) if self.on_cpu else a_cC
                    stats = panel_stats(a_cC, (form() for form in teachers), hard_temperature, scratch)
                parts.append(stats)
            of_rows.append(merge([rows for rows, _ in parts], hard_temperature))
            joined = join([columns for _, columns in parts])
            of_columns = joined if of_columns is None else merge([of_columns, joined], hard_temperature)
        assert of_columns is not None
        return join(of_rows), of_columns, torch.cat(diagonal_parts) if diagonal_parts else None, kept

    def kept_tiles(self, rows: int, columns: int, widths: Sequence[int]) -> list[int]:
        """Of each model, given by its width, how many tiles of the stripe are kept: in all as many as the embeddings take memory, or 64 MB.

        Those of the widest model first, whose products are the dearest; the first of the stripe.
        """
        left = max((rows + columns) * sum(widths), LEAST_KEPT) // (self.rows * self.columns) if self.on_cpu else 0
        tiles, counts = -(-rows // self.rows) * -(-columns // self.columns), [0] * len(widths)
        for model in sorted(range(len(widths)), key=lambda model: -widths[model]):
            counts[model] = min(tiles, left)
            left -= counts[model]
        return counts

    def _room(self, models: Sequence[Logits]) -> Kept:
        student = models[0]
        counts = self.kept_tiles(len(student.left_BD), len(student.right_ND), [model.left_BD.shape[1] for model in models])
        return tuple(student.gain.new_empty((count, self.rows, self.columns)) for count in counts) if any(counts) else ()

    def slopes(
        self,
        logits: StripeLogits,
        sides: tuple[SlopeWeights, SlopeWeights],
        hard_temperature: float | None,
        diagonal_weight: Tensor,
        kept: Kept,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        at_one = _at_one_reference(sides, hard_temperature) if self.on_cpu else None
        rows, columns = at_one or sides
        add = _add_softmaxes_at_one_reference if at_one else _add_softmaxes
        models = (logits.student, *logits.teachers)
        panel, *panels = scratch_panels(4 if at_one else 3, self.rows, logits.student, self.columns)
        for row in _tiles(models, self.rows, self.columns):
            for tile in row:
                slope_cC, scratch = tile.inside(panel).zero_(), [tile.inside(panel) for panel in panels]
                both = rows.lines(tile.rows), columns.lines(tile.columns)
                for model in range(len(models)):
                    logits_cC = tile.again(model, kept, panels[0])
                    for term in _terms(both, model, hard_temperature):
                        add(slope_cC, logits_cC, term, scratch)
                positives_c = tile.positives(slope_cC, logits.diagonal)
                if positives_c is not None:
                    positives_c.sub_(diagonal_weight)
                yield tile.rows, tile.columns, slope_cC.to(logits.student.right_ND.dtype)


class _Term(NamedTuple):
    """weight * exp(temperature * (logits - m)) of the rows and of the columns: what a side adds to the slope."""

    temperature: float
    m: tuple[Tensor, Tensor]
    weight: tuple[Tensor, Tensor]


def _terms(sides: tuple[SlopeWeights, SlopeWeights], model: int, hard_temperature: float | None) -> Iterator[_Term]:
    """Those that are functions of the logits of one model: 0 is the student, and teacher k is k + 1."""
    rows, columns = sides
    if model == 0:
        yield _Term(1.0, (rows.m_a, columns.m_a), (rows.student, columns.student))
        if hard_temperature is not None and rows.hard is not None and columns.hard is not None:
            yield _Term(hard_temperature, (rows.m_a, columns.m_a), (rows.hard, columns.hard))
    elif rows.m_b is not None and columns.m_b is not None and rows.teacher is not None and columns.teacher is not None:
        teacher = model - 1
        yield _Term(1.0, (rows.m_b[teacher], columns.m_b[teacher]), (rows.teacher[teacher], columns.teacher[teacher]))


def _add_softmaxes(slope_cC: Tensor, logits_cC: Tensor, term: _Term, scratch: Sequence[Tensor]) -> None:
    for m, weight, dim in zip(term.m, term.weight, (1, 0), strict=True):
        shifted_cC = torch.sub(logits_cC, m.unsqueeze(dim), out=scratch[1])
        if term.temperature != 1:
            shifted_cC.mul_(term.temperature)
        slope_cC.addcmul_(shifted_cC.exp_(), weight.unsqueeze(dim))


def _add_softmaxes_at_one_reference(slope_cC: Tensor, logits_cC: Tensor, term: _Term, scratch: Sequence[Tensor]) -> None:
    """`_add_softmaxes` where all m of both sides are the same number: one exponential instead of two."""
    shifted_cC = torch.sub(logits_cC, term.m[0][0], out=scratch[1])
    if term.temperature != 1:
        shifted_cC.mul_(term.temperature)
    row_weight_c, column_weight_C = term.weight
    slope_cC.addcmul_(shifted_cC.exp_(), torch.add(row_weight_c[:, None], column_weight_C, out=scratch[2]))


def _at_one_reference(sides: tuple[SlopeWeights, SlopeWeights], hard_temperature: float | None) -> tuple[SlopeWeights, SlopeWeights] | None:
    """The same weights for the largest m of all lines; None where some line lies so far below that its terms would vanish."""
    m_a = torch.maximum(*(side.m_a.max() for side in sides))
    of_b = [side.m_b.amax(1) for side in sides if side.m_b is not None]
    moved = tuple(side.moved(m_a, torch.maximum(*of_b) if of_b else None, hard_temperature) for side in sides)
    weights = [weight for side in moved for weight in (side.student, side.hard, side.teacher) if weight is not None]
    # not "some exceed it": nothing compares with nan
    within = all(bool((weight.abs() <= SLOPE_GAIN / LEAST_SUM).all()) for weight in weights)
    return (moved[0], moved[1]) if within else None


def _one_reference_stats(
    a_cC: Tensor, teachers: Sequence[Callable[[], Tensor]], hard_temperature: float | None, scratch: Sequence[Tensor]
) -> tuple[SoftmaxStats, SoftmaxStats] | None:
    """`panel_stats` with the largest logit of the tile in place of each line's own: one exponential for rows and columns.

    None where a line lies so far below that its sum has lost digits. Overwrites neither a_cC nor what `teachers` return.
    """
    m_a = a_cC.max()
    shifted_a_cC = torch.sub(a_cC, m_a, out=scratch[0])
    sums = [_sums(torch.exp(shifted_a_cC, out=scratch[1]))]
    if hard_temperature is not None:
        sums.append(_sums(torch.mul(shifted_a_cC, hard_temperature, out=scratch[1]).exp_()))
    if _have_lost_digits(sums):  # before the teachers' products
        return None
    m_b: list[Tensor] = []
    cross_terms: list[tuple[Tensor, Tensor]] = []
    for formed in teachers:
        b_cC = formed()
        m_b.append(b_cC.max())
        shifted_b_cC = torch.sub(b_cC, m_b[-1], out=scratch[1])
        exp_b_cC = torch.exp(shifted_b_cC, out=scratch[2])
        sums.append(_sums(exp_b_cC))
        cross_terms.append(_sums(shifted_b_cC.sub_(shifted_a_cC).mul_(exp_b_cC)))
    of_teachers = sums[2 if hard_temperature is not None else 1 :]
    if _have_lost_digits(of_teachers):
        return None
    stats = []
    for side in (0, 1):
        l_a = sums[0][side]
        l_hard = None if hard_temperature is None else sums[1][side]
        of_b: list[Tensor | None] = [None] * 3
        if of_teachers:
            l_b = torch.stack([both[side] for both in of_teachers])
            of_b = [torch.stack(m_b)[:, None].expand_as(l_b), l_b, torch.stack([both[side] for both in cross_terms])]
        stats.append(SoftmaxStats(m_a.expand_as(l_a), l_a, l_hard, *of_b))
    return stats[0], stats[1]


def _have_lost_digits(sums: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return any(bool(of_lines.min() < LEAST_SUM) for both in sums for of_lines in both)


def _sums(terms_cC: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows and of the columns."""
    return terms_cC.sum(1), terms_cC.sum(0)
