"""What of the student learns and how fast: `student.freeze`, `optim.rates`, `optim.layer_decay` and `optim.decays` on its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from megakd.models import clip
from megakd.models.heads import ObjectiveHead
from megakd.models.places import block_count, check_held, freeze, places
from megakd.models.student import Student
from megakd.recipe import Optim, Recipe
from megakd.recipe.optim import TOWERS, VECTORS
from megakd.recipe.parts import BLOCKS, EMBEDDINGS, Part, Place, narrowest
from megakd.training.optim import Pace, layer_factor


def paces(module: Student, optim: Optim, rates: Mapping[str, float]) -> Callable[[str, nn.Parameter], Pace]:
    """Of every parameter of the module, by name. rates: learning rates in place of optim's, by prefixes of names; the first counts.

    Raises ValueError as `places` does.
    """
    faster, decayed = _parts(optim, "rates"), _parts(optim, "decays")
    found = _places(module, optim) if faster or decayed or optim.layer_decay is not None else {}
    blocks = {tower: block_count(found, tower) for tower in TOWERS}

    def pace(name: str, parameter: nn.Parameter) -> Pace:
        place = found.get(name, Place(""))
        part = narrowest([part for _, part in faster], place)
        rate = optim.lr if part is None else optim.rates[part.name]
        rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), rate)
        factor = rate / optim.lr
        if place.tower in TOWERS:
            factor *= layer_factor(place, blocks[place.tower], optim.layer_decay_of(place.tower))
        if parameter.ndim < 2:
            return Pace(factor, optim.decays.get(VECTORS, 0.0))
        part = narrowest([part for _, part in decayed], place)
        return Pace(factor, optim.weight_decay if part is None else optim.decays[part.name])

    return pace


def check(recipe: Recipe, spec: clip.ModelSpec | None, heads: Callable[[], Mapping[str, ObjectiveHead]] | None) -> list[str]:
    """Of a run to come, on torch's meta device: which parts learn, and how fast, in words; empty where all learn alike.

    heads: what objectives train beside the towers; None while they are not known. Raises ValueError, with the key, for names of parts that
    the student has not or that `student.freeze` holds, and where nothing of it would learn.
    """
    optim, settings = recipe.optim, recipe.student
    if settings is None or spec is None:
        return []
    given = [*_parts(optim, "rates"), *_parts(optim, "decays")]
    if not settings.freeze and not given and optim.layer_decay is None and VECTORS not in optim.decays:
        return []
    towers = clip.on_meta(spec).clip
    with torch.device("meta"):
        module = Student(towers, heads() if heads is not None else {}, settings.max_scale)
    freeze(module, settings.freeze)
    found = _places(module, optim)
    check_held(found, [(key, part) for key, part in given if part.tower != "heads" or heads is not None])
    for key, part in given:
        held = [name for name, place in found.items() if part.holds(place)]
        if held and module.frozen.issuperset(held):
            raise ValueError(f"{key}: student.freeze = {settings.freeze} holds all of it, which does not learn; take one of the two out")
    for tower in optim.layer_decay if isinstance(optim.layer_decay, dict) else ():
        if tower in settings.freeze:
            raise ValueError(f"optim.layer_decay.{tower}: student.freeze = {settings.freeze} holds this tower; take one of the two out")
    return [*_of_frozen(towers, module, settings.freeze), *_of_rates(optim, settings.freeze, found)]


def _parts(optim: Optim, table: str) -> list[tuple[str, Part]]:
    """(key, part) of the names in `optim.rates` or `optim.decays`."""
    names: dict[str, float] = getattr(optim, table)
    return [(key := f"optim.{table}.{name}", Part.read(key, name)) for name in names if (table, name) != ("decays", VECTORS)]


def _places(module: Student, optim: Optim) -> dict[str, Place]:
    towers = TOWERS if isinstance(optim.layer_decay, float) else optim.layer_decay or ()
    return places(module, [*_parts(optim, "rates"), *_parts(optim, "decays")], dict.fromkeys(towers, "optim.layer_decay"))


def _of_frozen(towers: nn.Module, module: Student, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    of = {f"clip.{name}": parameter.numel() for name, parameter in towers.named_parameters()}
    learned = sum(count for name, count in of.items() if name not in module.frozen)
    return [f"trained: {_millions(learned)} of the student's {_millions(sum(of.values()))} parameters; frozen: {', '.join(names)}"]


def _of_rates(optim: Optim, frozen: Sequence[str], found: Mapping[str, Place]) -> list[str]:
    lines = []
    if optim.rates:
        lines.append(f"learning rates: {optim.lr:g}" + "".join(f"; {name} {rate:g}" for name, rate in optim.rates.items()))
    for tower in TOWERS:
        if (decay := optim.layer_decay_of(tower)) < 1 and tower not in frozen:
            blocks = block_count(found, tower)
            low, last = (layer_factor(place, blocks, decay) for place in (Place(tower, EMBEDDINGS), Place(tower, BLOCKS, blocks - 1)))
            lines.append(
                f"layer decay of {tower}: {decay:g} for each of {blocks} blocks; {last:.3g} in the last, {low:.3g} in its embeddings"
            )
    if optim.decays:
        lines.append(f"weight decay: {optim.weight_decay:g}" + "".join(f"; {name} {decay:g}" for name, decay in optim.decays.items()))
    return lines


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
