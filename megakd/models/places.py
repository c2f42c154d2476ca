"""Where each parameter of a student is, for the names of `recipe/parts.py`: its tower, and before, in or behind which block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from megakd.models.casts import SCALARS
from megakd.models.patches import every_block
from megakd.models.student import Student
from megakd.recipe.parts import BLOCKS, EMBEDDINGS, HEAD, HEADS, IMAGE, SCALE, TEXT, Part, Place

# Parameters and modules that stand where the order of a tower's parts does not tell it: open_clip's projections are registered first, and
# the words of a CLIP whose text tower is unpacked come after its blocks.
_LAST, _FIRST = ("proj", "text_projection"), ("token_embedding",)
_CLIP = "clip."
_LAYERS = ("resblocks", "layer", "layers", "block")  # of a text tower: open_clip's own, BERT's, M2M's, T5's


def places(module: Student, parts: Iterable[tuple[str, Part]], decayed: Mapping[str, str] | None = None) -> dict[str, Place]:
    """Of each parameter of a `Student` with towers; what a decoder has beside them is left out.

    parts: names with the recipe's keys that gave them. decayed: further keys that ask for a tower's blocks, by tower. A tower whose blocks
    none of them asks for is all "embeddings". Raises ValueError, which begins with the key, for one that has none that are known here.
    """
    clip: Any = module.clip
    asks = {part.tower: key for key, part in parts if part.part} | dict(decayed or {})
    found = {f"{HEADS}.{name}": Place(HEADS, name.partition(".")[0]) for name, _ in module.heads.named_parameters()}  # type: ignore[attr-defined]
    blocks = every_block(clip.visual, asks[IMAGE]) if IMAGE in asks else []
    found |= {_CLIP + name: place for name, place in _of_tower(clip.visual, "visual.", IMAGE, blocks)}
    text, prefix = (clip.text, "text.") if hasattr(clip, "text") else (clip, "")
    blocks = text_blocks(clip, asks[TEXT]) if TEXT in asks else []
    found |= {_CLIP + name: place for name, place in _of_tower(text, prefix, TEXT, blocks) if _CLIP + name not in found}
    for name, _ in clip.named_parameters():
        if name in SCALARS:
            found[_CLIP + name] = Place(SCALE)
        found.setdefault(_CLIP + name, Place(TEXT, HEAD))  # CoCa's decoder of texts, which stands on its text tower
    return found


def text_blocks(clip: Any, key: str, remedy: str = "name the tower as a whole") -> list[nn.Module]:
    """The layers of a text tower, open_clip's own or transformers'. Raises ValueError, `key` first and `remedy` last, for another kind."""
    text = getattr(clip, "text", clip)
    transformer: Any = getattr(text, "transformer", None)
    encoder = getattr(transformer, "encoder", transformer)
    blocks = next((getattr(encoder, name) for name in _LAYERS if hasattr(encoder, name)), None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise ValueError(f"{key}: a text tower of class {type(text).__name__} has no blocks that are known here; {remedy}")
    return list(blocks)


def _of_tower(tower: nn.Module, prefix: str, name: str, blocks: list[nn.Module]) -> Iterator[tuple[str, Place]]:
    """(name, place) of each of its parameters: those of modules registered before the blocks are embeddings, behind them the head's."""
    number_of = {id(block): number for number, block in enumerate(blocks)}
    reached: dict[str, int] = {}
    part = EMBEDDINGS
    for path, module in tower.named_modules():
        within = next((at for at in reached if path.startswith(f"{at}.")), None)
        if id(module) in number_of:
            reached[path], part = number_of[id(module)], HEAD
        for own, _ in module.named_parameters(recurse=False):
            where = f"{path}.{own}".lstrip(".")
            pieces = where.split(".")
            if path in reached or within is not None:
                yield prefix + where, Place(name, BLOCKS, reached[path if path in reached else within or ""])
            elif pieces[-1] in _LAST or (len(pieces) > 1 and pieces[0] in _LAST):
                yield prefix + where, Place(name, HEAD)
            else:
                yield prefix + where, Place(name, EMBEDDINGS if pieces[0] in _FIRST else part)


def named(places_of: Mapping[str, Place], parts: Iterable[Part]) -> list[str]:
    """Names of the parameters that one of the parts holds."""
    chosen = list(parts)
    return [name for name, place in places_of.items() if any(part.holds(place) for part in chosen)]


def check_held(places_of: Mapping[str, Place], parts: Iterable[tuple[str, Part]]) -> None:
    """Raises ValueError, which begins with the key, for a part that holds no parameter, and for blocks beyond a tower's last."""
    for key, part in parts:
        blocks = block_count(places_of, part.tower)
        if part.last is not None and part.last >= blocks:
            raise ValueError(f"{key}: the student's {part.tower} tower has {blocks} blocks, 0 to {blocks - 1}")
        if not any(part.holds(place) for place in places_of.values()):
            there = ", ".join(dict.fromkeys(f"{HEADS}.{place.part}" for place in places_of.values() if place.tower == HEADS)) or "no heads"
            raise ValueError(f"{key}: the student has no such part" + (f"; its objectives train {there}" if part.tower == HEADS else ""))


def block_count(places_of: Mapping[str, Place], tower: str) -> int:
    return 1 + max((place.block for place in places_of.values() if (place.tower, place.part) == (tower, BLOCKS)), default=-1)


def freeze(module: Student, names: Sequence[str]) -> None:
    """names: of `student.freeze`. Raises ValueError, with that key, for what this student has not, and where nothing of it would learn."""
    if not names:
        return
    parts = [(f"student.freeze: {name!r}", Part.read(name, name)) for name in names]
    found = places(module, parts)
    check_held(found, parts)
    frozen = named(found, [part for _, part in parts])
    if all(name in frozen for name, place in found.items() if place.tower in (IMAGE, TEXT)):
        raise ValueError(f"student.freeze = {list(names)}: nothing of the student would learn; take one of its parts out")
    module.freeze(frozen)
