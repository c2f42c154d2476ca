"""Towers whose blocks torch compiles: one graph for all blocks that differ in their weights alone, of a ViT all of a tower.

Blocks and not whole towers, because a graph of one block is compiled in seconds whatever the depth, and because what happens between
blocks stays as it is: activation checkpointing calls a compiled block again, objectives read a block's output. A block's `forward` is
compiled and not its call, as `nn.Module.compile` would: hooks, by which ZeRO-3 gathers weights and objectives read, then run around the
compiled code, where torch looks at them (inside, it takes them to be for ever what they were when it compiled). No module is wrapped and
no name changes, so checkpoints, exports and parameter groups do not know of it.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from torch import nn

from megakd.models.patches import Read, Weights, every_block, number_of
from megakd.models.places import text_blocks
from megakd.runtime import compiler
from megakd.runtime.launch import World


def outline(clip: Any, role: str, world: World, reads: Collection[Read] = (), *, texts: bool = True) -> str:
    """What `compile_towers` would say of this model, for which it may lie on the meta device. A collective; raises as that."""
    return _outcome(_blocks(clip, role, reads, texts=texts), role, compiler.lacking(world))


def compile_towers(clip: Any, role: str, world: World, reads: Collection[Read] = (), *, texts: bool = True) -> tuple[str, list[nn.Module]]:
    """Have the blocks of a model's towers compute as torch compiles them, in place: what came of it, in words, and those that do.

    Where a rank has no compiler none does. role: of the recipe, whose key `compile` asks for it. reads: what objectives read of the image
    tower; a block whose attention is read stays as it is, since what reads it is a hook inside. texts: whether its text tower is used.
    A collective. Raises ValueError, naming the key, for a tower without blocks that are known here.
    """
    towers, problem = _blocks(clip, role, reads, texts=texts), compiler.lacking(world)
    done = [] if problem is not None else [block for tower, blocks in towers.items() for block in _compile(blocks, f"{role}, {tower}")]
    return _outcome(towers, role, problem), done


def _blocks(clip: Any, role: str, reads: Collection[Read], *, texts: bool) -> dict[str, list[nn.Module]]:
    key, remedy = f"{role}.compile = true", "take the key out"
    every = every_block(clip.visual, key)
    read = {number_of(clip.visual, one.block, key) for one in reads if isinstance(one, Weights)}
    found = {"image": [block for number, block in enumerate(every) if number not in read]}
    return found | ({"text": text_blocks(clip, key, remedy)} if texts and hasattr(clip, "encode_text") else {})


def _compile(blocks: list[nn.Module], named: str) -> list[nn.Module]:
    by_class: dict[type[nn.Module], Any] = {}
    for block in blocks:
        kind = type(block)
        if kind not in by_class:
            count = sum(type(other) is kind for other in blocks)
            by_class[kind] = compiler.compiled(kind.forward, f"{named}: {count} x {kind.__name__}")
        block.forward = functools.partial(by_class[kind], block)
    return blocks


def _outcome(towers: dict[str, list[nn.Module]], role: str, problem: compiler.Problem | None) -> str:
    if problem is not None:
        return f"{role}.compile: there is {problem[0]}, so its towers run as without the key; {problem[1]}"
    blocks = " and ".join(f"{len(blocks)} of its {tower} tower" for tower, blocks in towers.items())
    return f"{role}.compile: blocks by torch.compile, {blocks}; the first step of this start compiles them"
