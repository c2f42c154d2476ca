"""Which weights a student begins with: found, checked and said before a run, and read at its start.

Only the first rank reads; the others get what it has read. A resumed run reads what its checkpoint does not hold alone: the weights of
parts that are not trained.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megakd.models import pretrained
from megakd.models.clip import ModelSpec
from megakd.models.start.inherit import Inherited
from megakd.models.start.parts import Opened, Outline, Source, Tower, tower_of
from megakd.models.weights import listed
from megakd.runtime import collectives
from megakd.runtime.launch import World
from megakd.runtime.run_folder import REST

PARTS: dict[Tower | None, str] = {"image": "image tower", "text": "text tower", None: REST}


@dataclass(frozen=True)
class PartStart:
    """What a part of the student begins with. sources: origin -> tensors from it; to_come: origins that are not on this machine yet.

    new: names of the tensors that are drawn from the seed, or have their first value, as a logit scale has.
    """

    sources: dict[str, int]
    to_come: list[str]
    new: list[str]

    def __str__(self) -> str:
        parts = [f"{count} tensor{'s' * (count != 1)} from {origin}" for origin, count in self.sources.items()]
        parts += [f"from {origin}, which is not on this machine yet" for origin in self.to_come]
        if self.new and not self.to_come:
            parts.append(f"{len(self.new)} new ({listed(self.new)})" if parts or len(self.new) < 3 else f"all {len(self.new)} new")
        return ", ".join(parts)


class Start:
    """The weights that a student begins with: those of its `pretrained`, which `clip.build` reads, or of sources for parts of it.

    Raises ValueError, naming the key, for a source that is not of the student's kind.
    """

    def __init__(self, student: ModelSpec, sources: Sequence[Source]) -> None:
        self._outline, self._sources = Outline.of(student), tuple(sources)
        settings = student.settings
        named = " ".join(part for part in (settings.model, settings.pretrained) if part)
        self._whole = None if pretrained.is_random(settings) else named
        self._opened = dict[Source, Opened]()
        for source in self._sources:
            if isinstance(source, Inherited):
                source.check(self._outline)

    def look(self) -> None:
        """Check the weights that are on this machine by their names and shapes. Raises ValueError as `Source.open` does."""
        for source in self._sources:
            if source not in self._opened and source.is_here():
                self._opened[source] = source.open(self._outline)

    def fetch(self) -> None:
        """Bring what is not on this machine, and check it. Raises ValueError, naming the key, where nothing comes."""
        for source in self._sources:
            source.fetch()
        self.look()

    def load(self, clip: nn.Module, have: Collection[str], world: World) -> None:
        """Put the sources' values into a student that was drawn at random, once. A collective, after `fetch` on the first rank.

        have: names of a checkpoint's tensors, which are not read. Raises ValueError, on every rank, for values that no trained model has.
        """
        state: dict[str, Tensor] = clip.state_dict()

        def read() -> list[str]:
            names = []
            for opened in self._opened.values():
                for name in (name for name in opened.names if f"clip.{name}" not in have):
                    state[name].copy_(opened.read(name).reshape(state[name].shape))
                    names.append(name)
            # A library's weights are a second model in memory.
            self._opened = {source: replace(opened, read=_read_once) for source, opened in self._opened.items()}
            return names

        with torch.no_grad():
            for name in collectives.by_main(read, world):
                if world.size > 1:
                    values = state[name].reshape(-1).clone()
                    dist.broadcast(values.view(torch.uint8), 0)
                    state[name].copy_(values.reshape(state[name].shape))

    def parts(self) -> dict[str, PartStart]:
        """By "image tower", "text tower", "the rest" (scale, bias, a decoder of captions): what `look` has found."""
        found = {}
        for tower, part in PARTS.items():
            names = [name for name in self._outline.shapes if tower_of(name) == tower]
            if not names:
                continue
            if self._whole is not None:
                found[part] = PartStart({self._whole: len(names)}, [], [])
                continue
            given = {_called(source): set(opened.names) & set(names) for source, opened in self._opened.items()}
            waiting = [_called(one) for one in self._sources if one not in self._opened and _is_for(one, tower)]
            new = [name for name in names if not any(name in of for of in given.values())]
            found[part] = PartStart({origin: len(of) for origin, of in given.items() if of}, waiting, new)
        return found

    def describe(self) -> list[str]:
        """For people: a line of where the tensors are from, and one of what is changed on the way."""
        lines = [f"student begins with: {'; '.join(f'{name}: {part}' for name, part in self.parts().items())}"]
        return lines + [f"{source.key}: {'; '.join(opened.notes)}" for source, opened in self._opened.items() if opened.notes]

    def record(self) -> dict[str, Any]:
        """`describe` for run.json: by part, "tensors" by source and the names of those that are "new", or "all"; "notes" by key."""
        found = self.parts()
        parts: dict[str, Any] = {
            name: {"tensors": part.sources, "new": part.new if part.sources else "all"} for name, part in found.items()
        }
        return parts | {"notes": {source.key: list(opened.notes) for source, opened in self._opened.items() if opened.notes}}


def _is_for(source: Source, tower: Tower | None) -> bool:
    """With both towers, scale and bias are the source's, too."""
    return tower in source.towers or (tower is None and len(source.towers) > 1)


def _read_once(name: str) -> Tensor:
    raise AssertionError(f"{name}: was read before")


def _called(source: Source) -> str:
    return f"{source.origin} ({source.key.partition(' = ')[0]})"
