"""All evaluations that a recipe names, over all ranks, as one nested dict: what `evaluation.json` holds.

Images are split over the ranks and their embeddings gathered; every rank then scores the whole set, so that all return the same.
A sample that cannot be read counts as wrong in every score of its set. Raises ValueError, on every rank, when more than
data.max_bad_fraction of a set are unreadable, and when an embedding is not finite.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megakd.data.bad_samples import BadCounter
from megakd.data.evaluation import EvaluationBatch, Field, SampleSet, Unreadable, evaluation_batches
from megakd.data.transforms import TowerView
from megakd.evaluation import hard_negatives, retrieval, zero_shot
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.probes import score_probes
from megakd.evaluation.reader import score_readers
from megakd.evaluation.sets import Sets, check_label, lost_in, open_sets
from megakd.models.clip import parameters_in
from megakd.runtime import collectives
from megakd.runtime.console import with_progress
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller

__all__ = ["Sets", "Suite", "open_sets"]

# Legend: N samples of a set, D embedding width.


@dataclass
class _Facts:
    """What ranks know of the samples of a set beside their embeddings, in the set's order.

    contents, captions, labels: of each readable sample. margins, repeated: by kind of hard negative, see `hard_negatives`.
    """

    bad: BadCounter = field(default_factory=BadCounter)
    unreadable: list[Unreadable] = field(default_factory=list)
    contents: list[tuple[int, int]] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    margins: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    repeated: Counter[str] = field(default_factory=Counter)

    def merge(self, other: _Facts) -> None:
        self.bad.merge(other.bad)
        self.unreadable += other.unreadable
        self.contents += other.contents
        self.captions += other.captions
        self.labels += other.labels
        self.repeated.update(other.repeated)
        for kind, margins in other.margins.items():
            self.margins[kind] += margins


class Suite:
    """Runs the sets on one encoder. Every rank calls `run`, which raises Interrupted when a signal comes."""

    def __init__(self, sets: Sets, encoder: Encoder, world: World, workers: int, interruptions: StopPoller) -> None:
        self._interruptions = interruptions
        self._sets, self._encoder, self._world, self._workers = sets, encoder, world, workers
        self._view = TowerView(encoder.preprocess, encoder.tokenize)
        self._images, self._seconds = 0, 0.0

    def run(self, *, at_end: bool = True) -> dict[str, Any]:
        """{"zero_shot": {set: ...}, "retrieval": ..., "hard_negatives": ..., "parameters": n, "images_per_second": ...}

        at_end: with what takes a training of its own, "reader" and "probe": {set: ...}, where the recipe has some.
        """
        sets = self._sets
        results: dict[str, Any] = {
            "zero_shot": {name: self._zero_shot(*opened, f"evaluation.zero_shot.{name}") for name, opened in sets.zero_shot.items()},
            "retrieval": {name: self._retrieval(samples, f"evaluation.retrieval.{name}") for name, samples in sets.retrieval.items()},
            "hard_negatives": {
                name: self._hard_negatives(*opened, f"evaluation.hard_negatives.{name}") for name, opened in sets.hard_negatives.items()
            },
        }
        results["parameters"] = parameters_in(self._encoder.clip)
        results["images_per_second"] = self._images / self._seconds if self._seconds else None
        if at_end and sets.reader:
            results["reader"] = score_readers(sets.reader, self._encoder, self._world, self._interruptions)
        if at_end and sets.probe:
            results["probe"] = score_probes(sets.probe, self._encoder, self._world, self._interruptions)
        return results

    def _zero_shot(self, samples: SampleSet, classes: zero_shot.ClassSet, key: str) -> dict[str, Any]:
        def check(batch: EvaluationBatch) -> EvaluationBatch:
            unread = [(one.sample, one.cls) for one in batch.unreadable if one.cls is not None]
            for index, label in [*zip(batch.index.tolist(), _listed(batch.cls), strict=True), *unread]:
                check_label(label, classes, samples.where(index))
            return batch

        images, own = [], _Facts()
        for batch in self._batches(samples, ("pixels", "cls"), own, key, check):
            images.append(self._encode(batch))
            own.labels += _listed(batch.cls)
        facts, lost = self._everyones(own, samples, key)
        image_ND = self._gather(images, f"{key}: image")
        class_CD = finite(zero_shot.class_embeddings(self._encoder, classes), f"{key}: class")
        lost_labels = [one.cls for one in facts.unreadable if one.cls is not None]
        scores = zero_shot.accuracies(image_ND, torch.tensor(facts.labels, dtype=torch.int64), class_CD, lost, lost_labels)
        source = {"classes": classes.source} if classes.source else {}
        return {**scores, "unreadable": lost, "repeated_classes": len(classes.names) - len(set(classes.names)), **source}

    def _retrieval(self, samples: SampleSet, key: str) -> dict[str, Any]:
        """Each line of a sample's text is a caption of its image, as in CLIP_benchmark; samples of equal images share one image."""
        images, texts, own = [], [], _Facts()
        for batch in self._batches(samples, ("pixels", "content", "captions"), own, key):
            images.append(self._encode(batch))
            captions = [text.splitlines() for text in batch.captions or []]
            texts.append(self._encoder.encode_texts([line for lines in captions for line in lines]))
            own.captions += captions
            own.contents += [(high, low) for high, low in _listed(batch.content)]
        facts, unreadable = self._everyones(own, samples, key)
        image_ND, text_ND = self._gather(images, f"{key}: image"), self._gather(texts, f"{key}: caption")
        first_image, image_of = _distinct(facts.contents)
        lines = [line for captions in facts.captions for line in captions]
        first_text, text_of = _distinct(lines)
        counts = torch.tensor([len(captions) for captions in facts.captions], dtype=torch.int64)
        image_of_T = torch.tensor(image_of, dtype=torch.int64).repeat_interleave(counts)
        lost_images, lost_captions = _lost(facts, unreadable)
        both = retrieval.recalls(
            image_ND[first_image],
            text_ND[first_text],
            image_of_T,
            torch.tensor(text_of).long(),
            lost_images=lost_images,
            lost_captions=lost_captions,
        )
        return {
            **both,
            "mean_R@1": (both["image_to_text"]["R@1"] + both["text_to_image"]["R@1"]) / 2,
            "pairs": len(lines) + lost_captions,
            "images": len(first_image) + lost_images,
            "unreadable": unreadable,
            "repeated_captions": len(lines) - len(first_text),
            "repeated_images": len(facts.contents) - len(first_image),
            "blank_captions": sum(not line.strip() for line in lines),
            "ties": retrieval.TIES,
        }

    def _hard_negatives(self, samples: SampleSet, mean_from: int | None, key: str) -> dict[str, dict[str, float]]:
        def check(batch: EvaluationBatch) -> EvaluationBatch:
            for index, content in [*zip(batch.index.tolist(), batch.json or [], strict=True), *_known_json(batch.unreadable)]:
                hard_negatives.negatives_of(content, samples.where(index))
            return batch

        own = _Facts()
        for batch in self._batches(samples, ("pixels", "captions", "json"), own, key, check):
            captions, negatives = batch.captions or [], [hard_negatives.negatives_of(content, "") for content in batch.json or []]
            image_nD = self._encode(batch)
            for kind, margin_n in hard_negatives.margins(self._encoder, image_nD, captions, negatives).items():
                own.margins[kind] += margin_n.tolist()
            for caption, by_kind in zip(captions, negatives, strict=True):
                own.repeated.update(kind for kind, texts in by_kind.items() if caption.strip() in map(str.strip, texts))
        facts, lost = self._everyones(own, samples, key)
        known = [content.get(hard_negatives.KEY, {}) for _, content in _known_json(facts.unreadable)]
        kinds = sorted(set(facts.margins).union(*known))
        if not kinds:
            raise ValueError(f'{key}: no sample has hard negatives; its .json members need {{"negatives": {{KIND: FALSE CAPTION}}}}')
        results = dict[str, dict[str, float]]()
        for kind in kinds:
            margins = finite(torch.tensor(facts.margins[kind], dtype=torch.float64), f"{key}, {kind}: similarity")
            wrong = lost - sum(kind not in by_kind for by_kind in known)
            pairs = len(margins) + wrong
            results[kind] = {"accuracy": (margins > 0).sum().item() / pairs, "pairs": pairs, "unreadable": wrong}
            if facts.repeated[kind]:
                results[kind]["same_as_caption"] = facts.repeated[kind]
        return results if mean_from is None else {hard_negatives.MEAN: hard_negatives.mean_of_kinds(results, mean_from), **results}

    def _batches(
        self,
        samples: SampleSet,
        fields: tuple[Field, ...],
        own: _Facts,
        key: str,
        check: Callable[[EvaluationBatch], EvaluationBatch] = lambda batch: batch,
    ) -> Iterator[EvaluationBatch]:
        """This rank's batches; their unreadable samples go to `own`. check: may raise ValueError, which every rank then raises."""
        world, encoder = self._world, self._encoder
        batches = evaluation_batches(
            samples,
            self._view,
            rank=world.rank,
            world=world.size,
            batch=encoder.batch,
            fields=fields,
            workers=self._workers,
            pin_memory=world.device.type == "cuda",
        )
        between = self._interruptions.between(map(check, batches), len(samples), encoder.batch)
        for batch in with_progress(between, f"evaluating {key}", "batches", -(-(len(samples) // world.size) // encoder.batch)):
            own.bad.merge(batch.bad)
            own.unreadable += batch.unreadable
            if len(batch):
                yield batch

    def _everyones(self, own: _Facts, samples: SampleSet, key: str) -> tuple[_Facts, int]:
        """The facts of all ranks, and how many samples could not be read. Raises ValueError when those are too many."""
        facts = _Facts()
        for of_rank in collectives.everyones(own, self._world):
            facts.merge(of_rank)
        facts.bad.merge(lost_in(samples))
        try:
            facts.bad.check(samples.data.max_bad_fraction, at_least=1)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        return facts, facts.bad.total

    def _encode(self, batch: EvaluationBatch) -> Tensor:
        assert batch.pixels is not None
        start = time.perf_counter()
        image_nD = self._encoder.encode_pixels(batch.pixels)
        self._seconds += time.perf_counter() - start
        self._images += len(image_nD)
        return image_nD

    def _gather(self, batches: list[Tensor], what: str) -> Tensor:
        """(N, D), of all ranks in rank order. Raises ValueError on every rank when one is not finite."""
        local = torch.cat(batches) if batches else torch.zeros(0, self._encoder.width)
        return finite(collectives.gather_rows(local, self._world), what)


def _listed(values: Tensor | None) -> list[Any]:
    return [] if values is None else values.tolist()


def finite(values: Tensor, what: str) -> Tensor:
    """The values, (N,) or (N, D). Raises ValueError, naming `what`, where one is not finite."""
    good = values.isfinite() if values.ndim == 1 else values.isfinite().all(dim=1)
    if not good.all():
        raise ValueError(
            f"{what} embeddings are not finite, {int((~good).sum())} of {len(values)} (NaN or infinite): no score means anything. "
            "The weights are damaged or the training has diverged: take an earlier checkpoint, or lower optim.lr"
        )
    return values


def _distinct(values: list[Any]) -> tuple[list[int], list[int]]:
    """The index of each distinct value's first occurrence, and for each value the number of its distinct one."""
    first: dict[Any, int] = {}
    for index, value in enumerate(values):
        first.setdefault(value, index)
    number = {value: place for place, value in enumerate(first)}
    return list(first.values()), [number[value] for value in values]


def _known_json(unreadable: Iterable[Unreadable]) -> list[tuple[int, dict[str, Any]]]:
    return [(sample.sample, sample.json) for sample in unreadable if sample.json is not None]


def _lost(facts: _Facts, unreadable: int) -> tuple[int, int]:
    """Images and captions of a retrieval set that could not be read; one of each for a sample of which nothing is known."""
    contents = [sample.content for sample in facts.unreadable if sample.content is not None]
    images = len(set(contents) - set(facts.contents)) + unreadable - len(contents)
    return images, unreadable + sum(len(sample.caption.splitlines()) - 1 for sample in facts.unreadable if sample.caption is not None)
