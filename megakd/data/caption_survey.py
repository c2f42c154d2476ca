"""Before a run: which of the captions that a recipe names are there, by some of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megakd.data.bad_samples import BadSample
from megakd.data.captions import json_of
from megakd.data.shards import Sample, ShardSet
from megakd.recipe import texts
from megakd.recipe.captions import CaptionSource
from megakd.runtime import collectives
from megakd.runtime.launch import World

LOOKED_AT = 256  # samples, evenly spaced


@dataclass(frozen=True)
class Survey:
    """has, captions: by the sources' names, of so many `samples`, those that have captions there, and how many captions these are."""

    samples: int
    has: dict[str, int]
    captions: dict[str, int]

    def __str__(self) -> str:
        """For people."""
        found = (
            f"{name} {has:,}" + (f" with {self.captions[name]:,}" if self.captions[name] > has else "") for name, has in self.has.items()
        )
        return f"of {self.samples:,} samples looked at these have captions: {', '.join(found)}"


def captions_told(shards: ShardSet, world: World, *, read: bool) -> list[str]:
    """What is to be said of a training set's captions, where the recipe says more than the default. A collective.

    Raises ValueError, on every rank, as `survey`, and for what the recipe says of captions that are not read.
    """
    policy, clean = shards.captions, shards.data.clean
    if not read and (shards.data.captions is not None or clean):
        key = "clean" if shards.data.captions is None else "captions"
        raise ValueError(f"data.{key}: neither an objective nor a teacher of this recipe reads captions; take it out")
    lines = [f"captions: cleaned by {', '.join(clean)} (data.clean)"] if clean else []
    return lines if policy.is_single else [f"captions: {policy}; {collectives.by_main(lambda: survey(shards), world)}", *lines]


def survey(shards: ShardSet) -> Survey:
    """Of some samples of a training set. Reads members of captions alone.

    Raises ValueError, naming `data.captions`, for a member that no sample of the set has, and for a field that none of these samples has.
    """
    index = np.unique(np.arange(min(LOOKED_AT, len(shards))) * len(shards) // min(LOOKED_AT, len(shards))).tolist()
    found = [sample for sample in shards.read_each(index, shards.captions.needs) if isinstance(sample, Sample)]
    by_sample = list[list[list[str] | None]]()
    for sample in found:
        try:
            by_sample.append(shards.captions.by_source(sample.members))
        except BadSample:  # counted when it is read to be learned from
            continue
    names = [one.name for one in shards.captions.sources]
    of_source = dict(zip(names, zip(*by_sample, strict=True), strict=True)) if by_sample else dict.fromkeys(names, ())
    for one in shards.captions.sources:
        _check(one, shards, found, there=any(texts is not None for texts in of_source[one.name]))
    has = {name: sum(bool(captions) for captions in those) for name, those in of_source.items()}
    return Survey(len(by_sample), has, {name: sum(len(captions or ()) for captions in those) for name, those in of_source.items()})


def _check(source: CaptionSource, shards: ShardSet, found: Sequence[Sample], *, there: bool) -> None:
    bad = shards.known_bad.counts
    captioned = len(shards) - bad.get("missing_image", 0) - bad.get("missing_caption", 0)
    if shards.lacking.get(source.member, (0, ""))[0] >= captioned:
        raise ValueError(
            f"data.captions: {source.name!r}: no sample has a .{source.member} member; take it out, or give the right extension"
        )
    if there or source.path is None:
        return
    values, slot = list[Any](), shards.captions.slots[source.member]
    for sample in found:
        try:
            values += [json_of(sample.members[slot], source)] if sample.members.get(slot) else []
        except BadSample:
            continue
    if not values:  # a member that few samples have: nothing is known of its fields
        return
    fields = list(dict.fromkeys(f"{source.member}:{key}" for value in values if isinstance(value, dict) for key in value))
    near = texts.did_you_mean(source.name, fields)
    shown = f"; there are {', '.join(fields[:12])}" if fields else ", which hold no objects"
    raise ValueError(
        f"data.captions: {source.name!r}: none of {len(values)} .{source.member} members that were looked at has it{shown}. "
        f"{near}Name a field that is there, or take it out"
    )
