"""What is in a picture: one to three things on a 3x3 grid, each with a shape, a colour and a size.

Everything is a function of (seed, split, index). Every purpose (scene, words, pixels, questions) has its own random stream, so that a
caption needs no picture and a new question family moves no pixel. Only Python's `random.Random` is drawn from: its integer stream is the
same on every platform.
"""

from __future__ import annotations

import hashlib
import random
from typing import NamedTuple

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white")
SIZES = ("small", "large")
# Row by row; no name is a whole row's or column's.
CELLS = ("top left", "top center", "top right", "middle left", "center", "middle right", "bottom left", "bottom center", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")

# Few single things: there are only 630 such scenes, and the retrieval set needs distinct ones.
NUMBERS, NUMBER_WEIGHTS = (1, 2, 3), (20, 40, 40)
# Otherwise two things share a shape in one scene of six, and "how many circles" would mostly be "1".
REPEAT = 0.35
GROUP = 4  # scenes of train_hard that differ little, one after the other


class Thing(NamedTuple):
    shape: str
    colour: str
    size: str
    cell: int  # index into CELLS


Scene = tuple[Thing, ...]


def is_held_out(shape: str, colour: str) -> bool:
    """True for the seven of the 42 pairs that training never sees nor names: (shape + colour) % 6 == 0."""
    return (SHAPES.index(shape) + COLOURS.index(colour)) % 6 == 0


PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
HELD_OUT_PAIRS = tuple(pair for pair in PAIRS if is_held_out(*pair))
SEEN_PAIRS = tuple(pair for pair in PAIRS if not is_held_out(*pair))
_SEEN_BY = {word: tuple(pair for pair in SEEN_PAIRS if word in pair) for word in SHAPES + COLOURS}


def names_held_out(shape: str | None, colour: str | None) -> bool:
    return (shape, colour) in HELD_OUT_PAIRS


def sample_seed(seed: int, split: str, index: int, purpose: str = "scene", attempt: int = 0) -> int:
    """A 64-bit seed of its own for every (seed, split, index, purpose, attempt)."""
    name = f"{seed}/{split}/{index}/{purpose}/{attempt}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def stream(seed: int, split: str, index: int, purpose: str, attempt: int = 0) -> random.Random:
    return random.Random(sample_seed(seed, split, index, purpose, attempt))


def draw_scene(rng: random.Random) -> Scene:
    """One to three things in distinct cells, in random order, of pairs that training may see."""
    (number,) = rng.choices(NUMBERS, NUMBER_WEIGHTS)
    things: list[Thing] = []
    for cell in rng.sample(range(len(CELLS)), number):
        shape, colour = rng.choice(SEEN_PAIRS)
        if things and rng.random() < REPEAT:
            shape, colour = rng.choice(_SEEN_BY[rng.choice((things[0].shape, things[0].colour))])
        things.append(Thing(shape, colour, rng.choice(SIZES), cell))
    return tuple(things)


def draw_held_out(rng: random.Random) -> Scene:
    """One to three things in distinct cells, in random order, all of pairs that training never sees."""
    (number,) = rng.choices(NUMBERS, NUMBER_WEIGHTS)
    return tuple(Thing(*rng.choice(HELD_OUT_PAIRS), rng.choice(SIZES), cell) for cell in rng.sample(range(len(CELLS)), number))


def draw_group(rng: random.Random) -> tuple[Scene, ...]:
    """GROUP scenes of seen pairs: one, and others that differ from it in a single attribute of a single thing, each in another one."""
    scene = draw_scene(rng)
    changed = rng.randrange(len(scene))
    thing, taken = scene[changed], {one.cell for one in scene}
    changes = [
        [thing._replace(shape=shape) for shape in SHAPES if shape != thing.shape and not is_held_out(shape, thing.colour)],
        [thing._replace(colour=colour) for colour in COLOURS if colour != thing.colour and not is_held_out(thing.shape, colour)],
        [thing._replace(size=size) for size in SIZES if size != thing.size],
        [thing._replace(cell=cell) for cell in range(len(CELLS)) if cell not in taken],
    ]
    near = [rng.choice(things) for things in rng.sample(changes, GROUP - 1)]
    return scene, *((*scene[:changed], other, *scene[changed + 1 :]) for other in near)


def draw_single(rng: random.Random, shape: str, colour: str) -> Scene:
    """One thing of the given shape and colour, of any size, anywhere."""
    return (Thing(shape, colour, rng.choice(SIZES), rng.randrange(len(CELLS))),)


def scene_of(seed: int, split: str, index: int, attempt: int = 0) -> Scene:
    if split == "train_hard":
        group, place = divmod(index, GROUP)
        return draw_group(stream(seed, split, group, "scene", attempt))[place]
    draw = draw_held_out if split == "held_out" else draw_scene
    return draw(stream(seed, split, index, "scene", attempt))


def distinct_attempts(seed: int, split: str, count: int) -> list[int]:
    """The attempt of every index at which its scene differs from all earlier ones, the order of the things aside; recall@k needs that.

    A longer list starts with the shorter one.
    """
    seen: set[frozenset[Thing]] = set()
    attempts = []
    for index in range(count):
        attempt = 0
        while (scene := frozenset(scene_of(seed, split, index, attempt))) in seen:
            attempt += 1
        seen.add(scene)
        attempts.append(attempt)
    return attempts


def related(relation: str, one: Thing, other: Thing) -> bool:
    """Whether `one` is left of, right of, above or below `other`; diagonal neighbours are in two of these relations."""
    (row, column), (other_row, other_column) = divmod(one.cell, 3), divmod(other.cell, 3)
    if relation == "left of":
        return column < other_column
    if relation == "right of":
        return column > other_column
    return row < other_row if relation == "above" else row > other_row


def scene_graph(scene: Scene) -> dict[str, object]:
    """The scene as it stands in a sample's `.json`."""
    things = [
        {"shape": t.shape, "colour": t.colour, "size": t.size, "row": t.cell // 3, "column": t.cell % 3, "position": CELLS[t.cell]}
        for t in scene
    ]
    return {"rows": 3, "columns": 3, "things": things}
