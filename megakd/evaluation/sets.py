"""The image-text evaluation sets that a recipe names, opened and tried before anything is trained."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from megakd.data.bad_samples import BadCounter, BadSample, located
from megakd.data.caption_tokens import caption
from megakd.data.evaluation import labelled
from megakd.data.samples import Slot
from megakd.data.shards import Sample, ShardSet
from megakd.data.transforms import rgb_image
from megakd.evaluation import hard_negatives, probes, reader
from megakd.evaluation.diagnostics.pair import FEWEST, MOST
from megakd.evaluation.probes import ProbeSet
from megakd.evaluation.reader import ReaderSet
from megakd.evaluation.zero_shot import CLASSES, ClassSet, read_class_set
from megakd.recipe import Recipe
from megakd.recipe.schema import Scored
from megakd.runtime import collectives
from megakd.runtime.launch import World

# Keys of [evaluation] that recipes did not always have: the checksum of one without them is what it was.
_ADDED = ("reader", "probe")
_TRIED = 16  # samples of a set that are read at the start, until one can be read
TEXT_SETS = ("zero_shot", "retrieval", "hard_negatives")  # kinds that a model without a text tower is not scored by
# Reasons that only the indexes know: samples that are in no row of them.
_LOST = ("truncated_tar", "unused_members")


@dataclass
class Sets:
    """The opened evaluation sets of a recipe, by kind and name."""

    zero_shot: dict[str, tuple[ShardSet, ClassSet]] = field(default_factory=dict)
    retrieval: dict[str, ShardSet] = field(default_factory=dict)
    hard_negatives: dict[str, ShardSet] = field(default_factory=dict)
    diagnostics: dict[str, ShardSet] = field(default_factory=dict)
    reader: dict[str, ReaderSet] = field(default_factory=dict)
    probe: dict[str, ProbeSet] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.zero_shot or self.retrieval or self.hard_negatives or self.diagnostics or self.at_end)

    @property
    def at_end(self) -> bool:
        """Whether there are sets that need a training of their own, which read the tower's patch tokens."""
        return bool(self.reader or self.probe)

    def check_tower(self, model: nn.Module) -> list[str]:
        """A line for each set that reads patch tokens of this CLIP, perhaps on torch's meta device. Raises ValueError, with the key, where
        its tower does not give them."""
        visual: Any = model.visual
        probes.check_tower(self.probe, visual)
        return reader.check_tower(self.reader, visual)


def open_sets(recipe: Recipe | Scored, world: World) -> Sets:
    """Index every evaluation set and read its first sample with all that its evaluation needs. A collective.

    Raises ValueError, on every rank and naming the recipe's key, when a set is missing, empty or of another kind, and when more of its
    samples are known to be unreadable than data.max_bad_fraction allows.
    """
    sets = Sets()

    def shards(patterns: str, key: str, needs: tuple[Slot, ...], look: Callable[[Sample], object]) -> ShardSet:
        try:
            opened = ShardSet.open_set(
                patterns, recipe.data, world.rank, world.size, lambda: collectives.barrier(world), captions="caption" in needs
            )
            collectives.by_main(lambda: _try(opened, needs, look), world)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        return opened

    for name, folder in recipe.evaluation.zero_shot.items():
        key = f"evaluation.zero_shot.{name}"
        classes = read_class_set(folder, key)

        def labels(sample: Sample, classes: ClassSet = classes) -> None:
            check_label(labelled(sample, "cls"), classes, sample.where)

        sets.zero_shot[name] = (shards(f"{folder.rstrip('/')}/test/*.tar", key, ("image", "cls"), labels), classes)
    for name, patterns in recipe.evaluation.retrieval.items():
        sets.retrieval[name] = shards(patterns, f"evaluation.retrieval.{name}", ("image", "caption"), lambda _: None)
    for name, patterns in recipe.evaluation.hard_negatives.items():
        sets.hard_negatives[name] = shards(
            patterns,
            f"evaluation.hard_negatives.{name}",
            ("image", "caption", "json"),
            lambda sample: hard_negatives.negatives_of(labelled(sample, "json"), sample.where),
        )
    for name, patterns in recipe.evaluation.diagnostics.items():
        key = f"evaluation.diagnostics.{name}"
        opened = sets.diagnostics[name] = shards(patterns, key, ("image", "caption"), lambda _: None)
        if not FEWEST <= len(opened) <= MOST:
            raise ValueError(
                f"{key}: {len(opened)} samples; neighbours and ranks need {FEWEST}, and rows of similarities are formed of up to {MOST}: "
                f"give {'more' if len(opened) < FEWEST else 'fewer'} shards"
            )
    sets.reader = reader.open_readers(recipe, world)
    for name, probe in recipe.evaluation.probe.items():
        train, test = (
            shards(probes.patterns(given, part), f"evaluation.probe.{name}.{part}", ("image", "cls"), lambda one: labelled(one, "cls"))
            for part, given in (("train", probe.train), ("test", probe.test))
        )
        sets.probe[name] = ProbeSet(probe, train, test, (lost_in(train), lost_in(test)))
    return sets


def check_label(label: int, classes: ClassSet, where: str) -> None:
    """Raises ValueError for a label that is no line of the class names."""
    if not 0 <= label < len(classes.names):
        raise ValueError(
            f"{where}: its label (.cls) is {label}; labels must be numbers from 0 to {len(classes.names) - 1}, "
            f"one for each line of {CLASSES}"
        )


def sets_of(recipe: Recipe | Scored) -> str:
    """A checksum of the sets that a recipe is scored on, by which scores on other sets are recognised. Diagnostics are no scores: a student
    that has a teacher to be compared with is scored on the same sets as one without."""
    settings = recipe.evaluation.model_dump(mode="json", exclude={"every", "batch", "vqa_batch", "diagnostics"})
    settings = {key: value for key, value in settings.items() if value or key not in _ADDED}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def lost_in(shards: ShardSet) -> BadCounter:
    """Samples that are in no row of the set's indexes, as far as these count them."""
    known = shards.known_bad
    lost = {reason: count for reason, count in known.counts.items() if reason in _LOST and count}
    return BadCounter(sum(lost.values()), lost, {reason: known.examples.get(reason, "") for reason in lost})


def _try(shards: ShardSet, needs: tuple[Slot, ...], look: Callable[[Sample], object]) -> None:
    """Read the first sample that can be read, with all that is needed of it. For rank 0.

    Raises ValueError for a label that `look` refuses, and when too much of the set is known to be unreadable.
    """
    bad = lost_in(shards)
    for index in range(min(len(shards), _TRIED)):
        try:
            sample = shards.read(index, needs)
            with located(sample.where):
                rgb_image(sample.members["image"], shards.data.max_pixels)
                if "caption" in needs:
                    caption(sample.members["caption"])
        except BadSample as error:
            bad.add(error.reason, str(error))
            with contextlib.suppress(BadSample):
                look(shards.read(index, tuple(slot for slot in needs if slot not in ("image", "caption"))))
            continue
        look(sample)
        break
    bad.seen += len(shards)
    bad.check(shards.data.max_bad_fraction, at_least=1)
