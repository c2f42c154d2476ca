"""True captions of five kinds and hard negatives that are false.

A caption is a `Claim` first and a text second: `holds` tells whether it is true of a scene, and an edit of a true claim is a negative only
when it is false. Mentions are in random order, so that an exchange of two leaves no trace in the text alone. Outside their own split no
text, negatives included, names a held-out pair: a teacher trained with negatives would learn that those pairs are never true.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import NamedTuple

from megakd.data.shapes.scene import CELLS, COLOURS, RELATIONS, SEEN_PAIRS, SHAPES, SIZES, Scene, Thing, names_held_out, related

CAPTION_KINDS = ("full", "partial", "relational", "counting", "synonyms")
# Shares among the training captions; a kind that a scene does not allow becomes "full".
CAPTION_WEIGHTS = (40, 30, 15, 5, 10)
NEGATIVE_KINDS = ("attribute_swap", "relation", "attribute", "object", "count")

NUMBER_WORDS = ("zero", "one", "two", "three")
# Single words that begin with a consonant, so that article and token count stay; triangle and star have none.
SYNONYMS = {
    "small": "little", "large": "big", "red": "crimson", "green": "lime", "blue": "cobalt", "yellow": "golden", "purple": "violet",
    "cyan": "turquoise", "white": "snowy", "circle": "disc", "square": "box", "cross": "plus", "diamond": "rhombus",
    "top": "upper", "bottom": "lower",
}  # fmt: skip
_TRIES = 8  # edits drawn for a negative before its kind is given up for this scene


class Mention(NamedTuple):
    """What is said of one thing; None is unsaid."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    cell: int | None = None

    def fits(self, thing: Thing) -> bool:
        return all(mine is None or mine == value for mine, value in zip(self, thing, strict=True))

    def saying(self, attribute: str, value: str | int) -> Mention:
        return Mention(**{**self._asdict(), attribute: value})

    def words(self, article: str = "", plural: bool = False) -> str:
        noun = self.shape or "thing"
        if plural:
            noun += "es" if noun == "cross" else "s"
        words = " ".join(word for word in (article, self.size, self.colour, noun) if word)
        return words if self.cell is None else f"{words} at the {CELLS[self.cell]}"


@dataclass(frozen=True, slots=True)
class Claim:
    """Distinct things fit the mentions; relation: of the first to the second; complete: there is nothing else.

    counts: instead, exactly so many things fit each mention.
    """

    mentions: tuple[Mention, ...]
    relation: str | None = None
    counts: tuple[int, ...] = ()
    complete: bool = False


@dataclass(frozen=True, slots=True)
class Caption:
    kind: str
    claim: Claim
    wording: Mapping[str, str] = field(default_factory=dict)  # word -> synonym used in its place

    @property
    def text(self) -> str:
        claim = self.claim
        if claim.counts:
            parts = [f"{NUMBER_WORDS[n]} {m.words(plural=n != 1)}" for m, n in zip(claim.mentions, claim.counts, strict=True)]
        else:
            parts = [mention.words("a") for mention in claim.mentions]
        text = f" {claim.relation} ".join(parts) if claim.relation else " and ".join(parts)
        if claim.complete:
            text = f"only {text}"
        return " ".join(self.wording.get(word, word) for word in text.split(" ")) if self.wording else text


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether the claim is true of the scene."""
    if claim.counts:
        return all(sum(map(m.fits, scene)) == n for m, n in zip(claim.mentions, claim.counts, strict=True))
    if claim.complete and len(claim.mentions) != len(scene):
        return False
    for things in permutations(scene, len(claim.mentions)):
        fit = all(m.fits(t) for m, t in zip(claim.mentions, things, strict=True))
        if fit and (claim.relation is None or related(claim.relation, things[0], things[1])):
            return True
    return False


def captions(scene: Scene, rng: random.Random) -> dict[str, Caption]:
    """A true caption of every kind that the scene allows; "relational" needs two things."""
    order = rng.sample(scene, len(scene))
    full = Claim(tuple(Mention(*thing) for thing in order), complete=True)
    by_kind = {
        "full": Caption("full", full),
        "partial": Caption("partial", Claim(tuple(_mention_in_part(t, rng) for t in order[: rng.randint(1, len(order))]))),
        "counting": Caption("counting", _counting(scene, rng)),
        # The size words always change, so that the kind is never "full" in disguise.
        "synonyms": Caption("synonyms", full, {w: s for w, s in SYNONYMS.items() if w in SIZES or rng.random() < 0.7}),
    }
    if len(order) > 1:
        true = [relation for relation in RELATIONS if related(relation, order[0], order[1])]
        pair = tuple(_mention_in_part(thing, rng)._replace(cell=None) for thing in order[:2])
        by_kind["relational"] = Caption("relational", Claim(pair, relation=rng.choice(true)))
    return by_kind


def training_kind(by_kind: Mapping[str, Caption], rng: random.Random) -> str:
    (kind,) = rng.choices(CAPTION_KINDS, CAPTION_WEIGHTS)
    return kind if kind in by_kind else "full"


def _mention_in_part(thing: Thing, rng: random.Random) -> Mention:
    shape, colour = rng.choice(((thing.shape, thing.colour), (thing.shape, thing.colour), (thing.shape, None), (None, thing.colour)))
    return Mention(shape, colour, thing.size if rng.random() < 0.4 else None, thing.cell if rng.random() < 0.4 else None)


def _counting(scene: Scene, rng: random.Random) -> Claim:
    by = rng.choice(("shape", "colour", "nothing"))
    mentions = [Mention(shape=t.shape) if by == "shape" else Mention(colour=t.colour) if by == "colour" else Mention() for t in scene]
    distinct = list(dict.fromkeys(mentions))
    rng.shuffle(distinct)
    return Claim(tuple(distinct), counts=tuple(mentions.count(m) for m in distinct))


def negatives(caption: Caption, scene: Scene, rng: random.Random) -> dict[str, str]:
    """Captions in the wording of a true one that are false of the scene, by the kinds that apply.

    attribute_swap: two mentions exchange colours or shapes. relation: two things exchange places, or sides of a relation. attribute:
    another colour or size. object: another shape. count: one thing more or fewer.
    """
    by_kind = {}
    for kind in NEGATIVE_KINDS:
        for _ in range(_TRIES):
            edited = _EDITS[kind](caption.claim, rng)
            if edited is None:
                break
            if not any(names_held_out(m.shape, m.colour) for m in edited.mentions) and not holds(edited, scene):
                by_kind[kind] = Caption(caption.kind, edited, caption.wording).text
                break
    return by_kind


def _with(claim: Claim, changes: Mapping[int, Mention]) -> Claim:
    return replace(claim, mentions=tuple(changes.get(i, mention) for i, mention in enumerate(claim.mentions)))


def _exchange(claim: Claim, one: int, other: int, attribute: str) -> Claim:
    a, b = claim.mentions[one], claim.mentions[other]
    return _with(claim, {one: a.saying(attribute, getattr(b, attribute)), other: b.saying(attribute, getattr(a, attribute))})


def _both_say(claim: Claim, attribute: str) -> list[tuple[int, int]]:
    """The pairs of mentions that say different things of the attribute."""
    values = [getattr(mention, attribute) for mention in claim.mentions]
    return [
        (i, j) for j in range(len(values)) for i in range(j) if values[i] is not None and values[j] is not None and values[i] != values[j]
    ]


def _swap_attributes(claim: Claim, rng: random.Random) -> Claim | None:
    options = [(*pair, attribute) for attribute in ("colour", "shape") for pair in _both_say(claim, attribute)]
    return _exchange(claim, *rng.choice(options)) if options else None


def _swap_places(claim: Claim, rng: random.Random) -> Claim | None:
    if claim.relation:
        return replace(claim, mentions=claim.mentions[::-1])
    pairs = _both_say(claim, "cell")
    return _exchange(claim, *rng.choice(pairs), "cell") if pairs else None


def _change(claim: Claim, rng: random.Random, values: Mapping[str, tuple[str, ...]]) -> Claim | None:
    options = [(i, a) for i, mention in enumerate(claim.mentions) for a in values if getattr(mention, a) is not None]
    if not options:
        return None
    index, attribute = rng.choice(options)
    mention = claim.mentions[index]
    other = rng.choice([value for value in values[attribute] if value != getattr(mention, attribute)])
    return _with(claim, {index: mention.saying(attribute, other)})


def _change_count(claim: Claim, rng: random.Random) -> Claim | None:
    if claim.relation:
        return None
    if claim.counts:
        index = rng.randrange(len(claim.counts))
        other = rng.choice([n for n in (1, 2, 3) if n != claim.counts[index]])
        return replace(claim, counts=(*claim.counts[:index], other, *claim.counts[index + 1 :]))
    if claim.complete and len(claim.mentions) > 1 and (len(claim.mentions) == 3 or rng.random() < 0.5):
        dropped = rng.randrange(len(claim.mentions))
        return replace(claim, mentions=claim.mentions[:dropped] + claim.mentions[dropped + 1 :])
    if len(claim.mentions) == 3:
        return None
    # One thing more, described as fully as the first and inserted anywhere.
    model, (shape, colour) = claim.mentions[0], rng.choice(SEEN_PAIRS)
    free = [cell for cell in range(len(CELLS)) if cell not in {m.cell for m in claim.mentions}]
    more = Mention(
        shape if model.shape else None,
        colour if model.colour else None,
        rng.choice(SIZES) if model.size else None,
        rng.choice(free) if model.cell is not None else None,
    )
    place = rng.randint(0, len(claim.mentions))
    return replace(claim, mentions=(*claim.mentions[:place], more, *claim.mentions[place:]))


_EDITS: dict[str, Callable[[Claim, random.Random], Claim | None]] = {
    "attribute_swap": _swap_attributes,
    "relation": _swap_places,
    "attribute": partial(_change, values={"colour": COLOURS, "size": SIZES}),
    "object": partial(_change, values={"shape": SHAPES}),
    "count": _change_count,
}
