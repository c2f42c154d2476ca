"""A student's towers as a part of a larger model of its kind: some of its layers, and in them some heads, MLP channels and widths.

TinyCLIP's weight inheritance by hand (arXiv 2309.12314): the residual width's indices are the same in every layer of a tower, those of
the joint embedding the same in both towers; heads are taken whole. Nothing is averaged or rescaled. Magnitude is the mean square of the
weights of a dimension, head or channel, averaged over the tensors that it occurs in: of the residual width and the joint embedding all
over the taken layers, of heads and channels within their layer.
The larger model is read tensor by tensor, once, and once more before for magnitudes.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers import resample_patch_embed
from torch import Tensor

from megakd.models.casts import SCALARS
from megakd.models.matching import interpolated
from megakd.models.start import family
from megakd.models.start.axes import Axis, Place, axes, blocks_of, head_width, place
from megakd.models.start.donor import Donor, FromDonor
from megakd.models.start.parts import Opened, Outline, Tower, seen_otherwise


def chosen_layers(have: int, want: int, how: Literal["even", "first"]) -> list[int]:
    """Of `have` layers the `want` that are taken, in order. even: the first, the last, and others at rounded equal distances."""
    if how == "first" or want == 1:
        return list(range(want))
    return [(2 * layer * (have - 1) + want - 1) // (2 * (want - 1)) for layer in range(want)]


def chosen(have: int, want: int, magnitudes: Tensor | None) -> Tensor:
    """Of `have` indices the `want` that are taken, ascending: those of the largest magnitudes, at equal ones and without any the first."""
    if magnitudes is None:
        return torch.arange(want)
    return magnitudes.sort(descending=True, stable=True).indices[:want].sort().values


@dataclass(frozen=True)
class _Cut:
    """One tensor of the student: which of the donor's it is a part of, and along which axes."""

    source: str
    axes: tuple[Axis | None, ...]
    shape: tuple[int, ...]


class Inherited(FromDonor):
    """See the module. towers: of the student that inherit; with both, the logit scale and bias are the donor's."""

    def __init__(
        self, donor: Donor, towers: tuple[Tower, ...], layers: Literal["even", "first"], widths: Literal["first", "magnitude"]
    ) -> None:
        super().__init__(donor)
        self.towers = towers
        self._layers: Literal["even", "first"] = layers
        self._by_magnitude = widths == "magnitude"

    def open(self, student: Outline) -> Opened:
        self.check(student)
        self.donor.check()
        cuts, notes = {}, []
        for tower in self.towers:
            have, want = blocks_of(self.donor.outline, tower), blocks_of(student, tower)
            taken = chosen_layers(have, want, self._layers)
            named = {place(name, tower): name for name in self.donor.outline.names(tower)}
            bare = _towers_without_projection(student)
            for name in student.names(tower):
                where = place(name, tower)
                source = named[Place(tower, None if where.block is None else taken[where.block], where.kind)]
                along = axes(place(source, tower), bare)
                assert along is not None
                cuts[name] = _Cut(source, along, student.shapes[name])
            notes.append(f"{tower} tower: layers {', '.join(map(str, taken))} of {have}")
        scalars = [name for name in SCALARS if len(self.towers) == 2 and {name} <= student.shapes.keys() & self.donor.outline.shapes.keys()]
        cuts |= {name: _Cut(name, (None,) * len(theirs), theirs) for name in scalars for theirs in [self.donor.outline.shapes[name]]}
        if "image" in self.towers:
            notes += seen_otherwise(self.donor.description.preprocess, student.description)
        part = _Part(self.donor, student, cuts, by_magnitude=self._by_magnitude)
        notes += part.in_words()
        return Opened(tuple(cuts), part.read, tuple(notes))

    def check(self, student: Outline) -> None:
        """Raises ValueError, naming the key, where the student is no part of this model; its weights need not be here."""
        for tower in self.towers:
            family.check(self.donor, student, tower)


def _towers_without_projection(outline: Outline) -> set[Tower]:
    """Those whose residual width is the joint embedding's."""
    towers: tuple[Tower, ...] = ("image", "text")
    return {tower for tower in towers if not any(_maps_to_embedding(name, tower) for name in outline.names(tower))}


def _maps_to_embedding(name: str, tower: Tower) -> bool:
    along = axes(place(name, tower), set()) or ()
    return any(axis is not None and axis.name == "embedding" for axis in along)


class _Part:
    """The donor's tensors cut to the student's. cuts: by the student's names."""

    def __init__(self, donor: Donor, student: Outline, cuts: Mapping[str, _Cut], *, by_magnitude: bool) -> None:
        self._donor, self._student, self._cuts, self._by_magnitude = donor, student, cuts, by_magnitude

    def in_words(self) -> list[str]:
        """How much of which axes is taken, and what is interpolated."""
        taken = dict[str, str]()
        for name, (have, want, _) in self._axes.items():
            if have != want:
                what = re.sub(r"block \S+ ", "", name)
                taken[what] = f"{what} {want} of {have}"
        how = "those of the largest magnitude" if self._by_magnitude else "the first"
        shapes = self._donor.outline.shapes
        whole = {name: zip(cut.axes, cut.shape, shapes[cut.source], strict=True) for name, cut in self._cuts.items()}
        resized = [name for name, one in whole.items() if any(axis is None and want != have for axis, want, have in one)]
        return [*([f"{', '.join(taken.values())}: {how}"] if taken else []), *(f"{name} interpolated" for name in resized)]

    def read(self, name: str) -> Tensor:
        cut = self._cuts[name]
        tensor = self._donor.weights.read(cut.source)
        for dimension, (axis, want) in enumerate(zip(cut.axes, cut.shape, strict=True)):
            if axis is not None and tensor.shape[dimension] != want:
                tensor = tensor.index_select(dimension, self._entries(axis))
        return self._resized(name, tensor, cut.shape)

    def _resized(self, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        if tuple(tensor.shape) == tuple(shape):
            return tensor
        if tensor.ndim == 4:
            patches: Tensor = resample_patch_embed(tensor.float(), list(shape[2:]))
            return patches
        return interpolated(name, tensor, self._student.model)

    @functools.cached_property
    def _axes(self) -> dict[str, tuple[int, int, int]]:
        """By name: entries of the donor's and of the student's, and how many numbers an entry has in a tensor."""
        found = {}
        for cut in self._cuts.values():
            for have, want, axis in zip(self._donor.outline.shapes[cut.source], cut.shape, cut.axes, strict=True):
                if axis is not None:
                    each = self._each(axis)
                    found[axis.name] = (have // axis.copies // each, want // axis.copies // each, each)
        return found

    def _each(self, axis: Axis) -> int:
        """Channels of a head; 1 of other axes."""
        tower: Tower = "image" if axis.name.startswith("image") else "text"
        return (head_width(self._student, tower) or 1) if axis.name.endswith("heads") else 1

    def _entries(self, axis: Axis) -> Tensor:
        """Indices of a dimension along this axis."""
        have, _, each = self._axes[axis.name]
        one = (self._chosen[axis.name][:, None] * each + torch.arange(each)).flatten()
        return torch.cat([one + copy * have * each for copy in range(axis.copies)])

    @functools.cached_property
    def _chosen(self) -> dict[str, Tensor]:
        magnitudes = self._magnitudes() if self._by_magnitude else {}
        return {name: chosen(have, want, magnitudes.get(name)) for name, (have, want, _) in self._axes.items()}

    def _magnitudes(self) -> dict[str, Tensor]:
        """Of the axes that are cut, for each of the donor's entries, in float64."""
        total: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        cut_along = {name for name, (have, want, _) in self._axes.items() if have != want}
        for cut in self._cuts.values():
            along = [(dimension, axis) for dimension, axis in enumerate(cut.axes) if axis is not None and axis.name in cut_along]
            if not along:
                continue
            squares = self._donor.weights.read(cut.source).double().square()
            for dimension, axis in along:
                have, _, each = self._axes[axis.name]
                by_copy = squares.transpose(0, dimension).reshape(axis.copies, have, each, -1)
                total[axis.name] = total[axis.name] + by_copy.mean((0, 2, 3))
        return dict(total)
