"""One tower's weights from a file: of a whole CLIP, of the tower alone, or of the model that open_clip wraps into it.

The projection to the joint embedding may be missing, or of another width: it then stays as it was drawn, which the run says. Every other
tensor of the tower has to be there.
"""

from __future__ import annotations

from dataclasses import dataclass

from megakd.models import matching, names, pretrained
from megakd.models.matching import Match
from megakd.models.start.parts import TEXT, VISUAL, Opened, Outline, Tower, is_projection, seen_otherwise, tower_of
from megakd.models.weights import Weights, in_memory
from megakd.recipe import Model

TRANSFORMER = "text.transformer."  # where open_clip has a Hugging Face text tower


@dataclass(frozen=True, eq=False)
class FileTower:
    """A tower from a file, or from that of an open_clip tag. settings: whose `pretrained` names it."""

    key: str
    tower: Tower
    settings: Model

    @property
    def towers(self) -> tuple[Tower, ...]:
        return (self.tower,)

    @property
    def origin(self) -> str:
        named = str(self.settings.pretrained)
        return named if pretrained.is_file(named) else f"{self.settings.model} {named}"

    def is_here(self) -> bool:
        return pretrained.weights_file(self.settings, download=False) is not None

    def fetch(self) -> None:
        with matching.errors_of(self.key):
            pretrained.weights_file(self.settings, download=True)

    def open(self, student: Outline) -> Opened:
        file = pretrained.weights_file(self.settings, download=False)
        assert file is not None
        with matching.errors_of(self.key):
            weights = in_memory(file, mapped=True)
            matching.check_activation(student.description.config, weights)
            selected = _selected(weights, self.tower, student)
        heads = tuple(f"{names.TRUNK}{name}" for name in _classifiers(student)) if self.tower == "image" else ()
        wanted = {name: student.shapes[name] for name in student.names(self.tower)}
        new = {name for name, shape in wanted.items() if is_projection(name, heads) and selected.shapes.get(name) != shape}
        kept = names.Renamed(selected, {name: names.Part((name,), shape) for name, shape in selected.shapes.items() if name not in new})
        expected = {name: shape for name, shape in wanted.items() if name not in new}
        with matching.errors_of(self.key):
            match = Match(self.key, student.description.config, student.model, expected, kept)
        notes = [f"{name} interpolated to {expected[name][-2]} positions" for name in match.resized]
        if self.tower == "image" and (tag := pretrained.tag_of(self.settings)) is not None:
            notes += seen_otherwise(tag, student.description)
        return Opened(tuple(expected), match.read, tuple(notes))


def _selected(weights: Weights, tower: Tower, student: Outline) -> Weights:
    """The tower's tensors under the student's names, and unknown ones; a file that has none of them as it is, to be refused."""
    own = {name: student.shapes[name] for name in student.names(tower)}
    whole = names.as_open_clips(matching.by_open_clips_layout(student.model, weights, student.shapes), student.shapes)
    if own.keys() & whole.shapes.keys():
        kept = (name for name in whole.shapes if tower_of(name) == tower)
        return names.Renamed(whole, {name: names.Part((name,), whole.shapes[name]) for name in kept})
    for prefix in (names.TRUNK, VISUAL) if tower == "image" else (TEXT, TRANSFORMER):
        part = names.as_part(weights, own, prefix, lambda name: names.only_trains(name, _classifiers(student)))
        if part is not weights:
            return part
    return weights


def _classifiers(student: Outline) -> tuple[str, ...]:
    trunk = getattr(student.model.visual, "trunk", None)
    return () if trunk is None else matching.classifiers(trunk)
