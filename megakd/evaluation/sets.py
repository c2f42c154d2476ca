"""The image-text evaluation sets that a recipe names, opened and tried before anything is trained."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import nn

from megakd.data.bad_samples import BadCounter, BadSample, located
from megakd.data.caption_tokens import caption
from megakd.data.evaluation import SampleSet, labelled
from megakd.data.samples import Slot
from megakd.data.shards import Sample, ShardSet
from megakd.data.transforms import rgb_image
from megakd.evaluation import annotation_files, class_folders, probes, reader
from megakd.evaluation.diagnostics.pair import FEWEST, MOST
from megakd.evaluation.hard_negatives import negatives_of
from megakd.evaluation.image_files import FileSet
from megakd.evaluation.probes import ProbeSet
from megakd.evaluation.reader import ReaderSet
from megakd.evaluation.zero_shot import CLASSES, ClassSet, read_class_set
from megakd.recipe import Data, Recipe
from megakd.recipe.evaluation import CaptionFiles, NegativeFiles, Probe
from megakd.recipe.schema import Scored
from megakd.runtime import collectives
from megakd.runtime.launch import World

T = TypeVar("T")
# Keys of [evaluation] that recipes did not always have: the checksum of one without them is what it was.
_ADDED = ("reader", "probe")
_TRIED = 16  # samples of a set that are read at the start, until one can be read
TEXT_SETS = ("zero_shot", "retrieval", "hard_negatives")  # kinds that a model without a text tower is not scored by
# Reasons that only the indexes know: samples that are in no row of them.
_LOST = ("truncated_tar", "unused_members")


class NegativeSet(NamedTuple):
    """mean_from: pairs that a kind needs to count in the mean of kinds; None for a set without one, whose kinds are the user's own."""

    samples: SampleSet
    mean_from: int | None = None


@dataclass
class Sets:
    """The opened evaluation sets of a recipe, by kind and name."""

    zero_shot: dict[str, tuple[SampleSet, ClassSet]] = field(default_factory=dict)
    retrieval: dict[str, SampleSet] = field(default_factory=dict)
    hard_negatives: dict[str, NegativeSet] = field(default_factory=dict)
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
    opener, wanted, sets = _Opener(recipe.data, world), recipe.evaluation, Sets()
    for name, folder in wanted.zero_shot.items():
        sets.zero_shot[name] = opener.zero_shot(folder, f"evaluation.zero_shot.{name}")
    for name, pairs in wanted.retrieval.items():
        sets.retrieval[name] = opener.retrieval(pairs, f"evaluation.retrieval.{name}")
    for name, negatives in wanted.hard_negatives.items():
        sets.hard_negatives[name] = opener.hard_negatives(negatives, f"evaluation.hard_negatives.{name}")
    for name, patterns in wanted.diagnostics.items():
        key = f"evaluation.diagnostics.{name}"
        opened = sets.diagnostics[name] = opener.shards(patterns, key, ("image", "caption"))
        if not FEWEST <= len(opened) <= MOST:
            raise ValueError(
                f"{key}: {len(opened)} samples; neighbours and ranks need {FEWEST}, and rows of similarities are formed of up to {MOST}: "
                f"give {'more' if len(opened) < FEWEST else 'fewer'} shards"
            )
    sets.reader = reader.open_readers(recipe, world)
    for name, probe in wanted.probe.items():
        sets.probe[name] = opener.probe(probe, f"evaluation.probe.{name}")
    return sets


def open_retrieval(pairs: str | CaptionFiles, key: str, data: Data, world: World) -> SampleSet:
    """A retrieval set by itself: samples with image and caption. Raises ValueError as `open_sets`."""
    return _Opener(data, world).retrieval(pairs, key)


@dataclass(frozen=True)
class _Opener:
    """Opens sets on all ranks together and tries a sample of each. Raises ValueError that begins with the recipe's key."""

    data: Data
    world: World

    def shards(self, patterns: str, key: str, needs: tuple[Slot, ...], look: Callable[[Sample], object] = lambda _: None) -> ShardSet:
        """look: raises ValueError for a sample that the set's evaluation could not use."""
        world = self.world
        try:
            opened = ShardSet.open_set(
                patterns, self.data, world.rank, world.size, lambda: collectives.barrier(world), captions="caption" in needs
            )
            collectives.by_main(lambda: _try(opened, needs, look), world)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        return opened

    def files(self, read: Callable[[], tuple[FileSet, T]], key: str, needs: tuple[Slot, ...]) -> tuple[FileSet, T]:
        """Image files with what `read` finds out beside them, on the first rank."""

        def tried() -> tuple[FileSet, T]:
            opened = read()
            _try(opened[0], needs, lambda _: None)
            return opened

        return self._by_main(tried, key)

    def _by_main(self, call: Callable[[], T], key: str) -> T:
        try:
            return collectives.by_main(call, self.world)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    def zero_shot(self, folder: str, key: str) -> tuple[SampleSet, ClassSet]:
        root = self._by_main(lambda: class_folders.find(folder, "test"), key)
        if root is not None:

            def read() -> tuple[FileSet, ClassSet]:
                images, names = class_folders.open_classes(root, self.data)
                return images, class_folders.class_set(folder, root, names)

            return self.files(read, key, ("image", "cls"))
        classes = read_class_set(folder, key)
        patterns = f"{folder.rstrip('/')}/test/*.tar"
        return self.shards(patterns, key, ("image", "cls"), lambda one: check_label(labelled(one, "cls"), classes, one.where)), classes

    def retrieval(self, pairs: str | CaptionFiles, key: str) -> SampleSet:
        needs: tuple[Slot, ...] = ("image", "caption")
        if isinstance(pairs, str):
            return self.shards(pairs, key, needs)
        return self.files(lambda: (annotation_files.captioned(pairs, self.data), None), key, needs)[0]

    def hard_negatives(self, negatives: str | NegativeFiles, key: str) -> NegativeSet:
        needs: tuple[Slot, ...] = ("image", "caption", "json")
        if isinstance(negatives, str):
            return NegativeSet(self.shards(negatives, key, needs, lambda one: negatives_of(labelled(one, "json"), one.where)))
        return NegativeSet(*self.files(lambda: annotation_files.with_negatives(negatives, self.data), key, needs))

    def probe(self, probe: Probe, key: str) -> ProbeSet:
        needs: tuple[Slot, ...] = ("image", "cls")
        parts, classes = list[SampleSet](), list[list[str]]()
        for part, given in (("train", probe.train), ("test", probe.test)):
            here = f"{key}.{part}"
            root = self._by_main(lambda given=given, part=part: class_folders.find(given, part), here)  # type: ignore[misc]
            if root is None:
                parts.append(self.shards(probes.patterns(given, part), here, needs, lambda one: labelled(one, "cls")))
            else:
                images, names = self.files(partial(class_folders.open_classes, root, self.data), here, needs)
                parts.append(images)
                classes.append(names)
        if len(classes) == 2 and classes[0] != classes[1]:
            odd = sorted(set(classes[0]) ^ set(classes[1]))
            raise ValueError(
                f"{key}: train and test have other class folders ({', '.join(odd[:3])}): classes are numbered by the sorted names of their "
                f"folders, which have to be the same"
            )
        return ProbeSet(probe, parts[0], parts[1], (lost_in(parts[0]), lost_in(parts[1])))


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
    settings = recipe.evaluation.model_dump(mode="json", exclude={"every", "batch", "vqa_batch", "weights", "diagnostics"})
    settings = {key: value for key, value in settings.items() if value or key not in _ADDED}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def lost_in(samples: SampleSet) -> BadCounter:
    """Samples that are in no row of the set's indexes, as far as these count them."""
    known = samples.known_bad
    lost = {reason: count for reason, count in known.counts.items() if reason in _LOST and count}
    return BadCounter(sum(lost.values()), lost, {reason: known.examples.get(reason, "") for reason in lost})


def _try(samples: SampleSet, needs: tuple[Slot, ...], look: Callable[[Sample], object]) -> None:
    """Read the first sample that can be read, with all that is needed of it. For rank 0.

    Raises ValueError for a label that `look` refuses, and when too much of the set is known to be unreadable.
    """
    bad = lost_in(samples)
    for index in range(min(len(samples), _TRIED)):
        try:
            sample = samples.read(index, needs)
            with located(sample.where):
                rgb_image(sample.members["image"], samples.data)
                if "caption" in needs:
                    caption(sample.members["caption"])
        except BadSample as error:
            bad.add(error.reason, str(error))
            with contextlib.suppress(BadSample):
                look(samples.read(index, tuple(slot for slot in needs if slot not in ("image", "caption"))))
            continue
        look(sample)
        break
    bad.seen += len(samples)
    bad.check(samples.data.max_bad_fraction, at_least=1)
