"""All evaluations that a recipe names, over all ranks, as one nested dict: what `evaluation.json` holds.

Images are split over the ranks and their embeddings gathered; every rank then scores the whole set, so that all return the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megakd.data.evaluation_loader import EvaluationBatch, Field, evaluation_batches
from megakd.data.shards import ShardSet
from megakd.data.views import TowerView
from megakd.evaluation import compositional, retrieval, zeroshot
from megakd.evaluation.encoder import Encoder
from megakd.models.towers import parameters_in
from megakd.recipe import Recipe
from megakd.runtime import collectives
from megakd.runtime.interruptions import Interruptions
from megakd.runtime.launch import World

# Legend: N samples of a set, D embedding width.


@dataclass
class Sets:
    """The opened evaluation sets of a recipe, by kind and name."""

    zero_shot: dict[str, tuple[ShardSet, zeroshot.ClassSet]] = field(default_factory=dict)
    retrieval: dict[str, ShardSet] = field(default_factory=dict)
    hard_negatives: dict[str, ShardSet] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.zero_shot or self.retrieval or self.hard_negatives)


def open_sets(recipe: Recipe, world: World) -> Sets:
    """Index every evaluation set. Raises ValueError naming the recipe's key when one is missing or empty."""
    sets = Sets()

    def shards(patterns: str, key: str) -> ShardSet:
        try:
            return ShardSet.open_set(patterns, recipe.data, world.rank, world.size, lambda: collectives.barrier(world))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    for name, folder in recipe.evaluation.zero_shot.items():
        key = f"evaluation.zero_shot.{name}"
        classes = zeroshot.read_class_set(folder, key)
        sets.zero_shot[name] = (shards(f"{folder.rstrip('/')}/test/*.tar", key), classes)
    for name, patterns in recipe.evaluation.retrieval.items():
        sets.retrieval[name] = shards(patterns, f"evaluation.retrieval.{name}")
    for name, patterns in recipe.evaluation.hard_negatives.items():
        sets.hard_negatives[name] = shards(patterns, f"evaluation.hard_negatives.{name}")
    return sets


class Suite:
    """Runs the sets on one encoder. Every rank calls `run`, which raises Interrupted when a signal comes."""

    def __init__(self, sets: Sets, encoder: Encoder, world: World, workers: int, interruptions: Interruptions) -> None:
        self._interruptions = interruptions
        self._sets, self._encoder, self._world, self._workers = sets, encoder, world, workers
        self._view = TowerView(encoder.preprocess, encoder.tokenize)
        self._images, self._seconds = 0, 0.0

    def run(self) -> dict[str, Any]:
        """{"zero_shot": {set: ...}, "retrieval": ..., "hard_negatives": ..., "parameters": n, "images_per_second": ...}"""
        results: dict[str, Any] = {
            "zero_shot": {name: self._zero_shot(*opened) for name, opened in self._sets.zero_shot.items()},
            "retrieval": {name: self._retrieval(shards) for name, shards in self._sets.retrieval.items()},
            "hard_negatives": {name: self._hard_negatives(shards) for name, shards in self._sets.hard_negatives.items()},
        }
        results["parameters"] = parameters_in(self._encoder.clip)
        results["images_per_second"] = self._images / self._seconds if self._seconds else None
        return results

    def _zero_shot(self, shards: ShardSet, classes: zeroshot.ClassSet) -> dict[str, float]:
        images, labels = [], []
        for batch in self._batches(shards, ("pixels", "cls")):
            assert batch.cls is not None
            images.append(self._encode(batch))
            labels.append(batch.cls)
        label_N = self._gather(labels, torch.zeros(0, dtype=torch.int64))
        if len(label_N) == 0 or int(label_N.max()) >= len(classes.names) or int(label_N.min()) < 0:
            raise ValueError(
                f"{shards.names[0]}: its labels (.cls) must be numbers from 0 to {len(classes.names) - 1}, "
                f"one for each line of {zeroshot.CLASSES}"
            )
        return zeroshot.accuracies(self._gather(images), label_N, zeroshot.class_embeddings(self._encoder, classes))

    def _retrieval(self, shards: ShardSet) -> dict[str, Any]:
        images, texts = [], []
        for batch in self._batches(shards, ("pixels", "captions")):
            images.append(self._encode(batch))
            texts.append(self._encoder.texts(batch.captions or []))
        image_ND, text_ND = self._gather(images), self._gather(texts)
        if len(image_ND) == 0:
            raise ValueError(f"{shards.names[0]}: no sample of this evaluation set could be read")
        both = retrieval.recalls(image_ND, text_ND)
        return {**both, "mean_R@1": (both["image_to_text"]["R@1"] + both["text_to_image"]["R@1"]) / 2, "pairs": len(image_ND)}

    def _hard_negatives(self, shards: ShardSet) -> dict[str, dict[str, float]]:
        images: list[Tensor] = []
        captions: list[str] = []
        negatives: list[dict[str, str]] = []
        for batch in self._batches(shards, ("pixels", "captions", "json")):
            images.append(self._encode(batch))
            captions += batch.captions or []
            negatives += [own.get("negatives", {}) for own in batch.json or []]
        own = compositional.choices(self._encoder, torch.cat(images), captions, negatives) if captions else {}
        kinds = sorted(set().union(*self._everyones(sorted(own))))
        if not kinds:
            raise ValueError(f'{shards.names[0]}: no sample has hard negatives; its .json members need {{"negatives": {{KIND: CAPTION}}}}')
        none = {"accuracy": 0.0, "pairs": 0}
        pairs = torch.tensor([own.get(kind, none)["pairs"] for kind in kinds], dtype=torch.float64)
        right = pairs * torch.tensor([own.get(kind, none)["accuracy"] for kind in kinds], dtype=torch.float64)
        totals = collectives.start_sum(torch.cat([pairs, right]), self._world).read()
        return {
            kind: {"accuracy": totals[len(kinds) + number] / totals[number], "pairs": int(totals[number])}
            for number, kind in enumerate(kinds)
        }

    def _everyones(self, names: list[str]) -> list[list[str]]:
        gathered: list[Any] = [names] * self._world.size
        if self._world.size > 1:
            torch.distributed.all_gather_object(gathered, names)
        return gathered

    def _batches(self, shards: ShardSet, fields: tuple[Field, ...]) -> Iterator[EvaluationBatch]:
        world, encoder = self._world, self._encoder
        batches = evaluation_batches(
            shards,
            self._view,
            rank=world.rank,
            world=world.size,
            batch=encoder.batch,
            fields=fields,
            workers=self._workers,
            pin_memory=world.device.type == "cuda",
        )
        return self._interruptions.between(batches, len(shards), encoder.batch)

    def _encode(self, batch: EvaluationBatch) -> Tensor:
        assert batch.pixels is not None
        start = time.perf_counter()
        image_nD = self._encoder.images(batch.pixels)
        self._seconds += time.perf_counter() - start
        self._images += len(image_nD)
        return image_nD

    def _gather(self, pieces: list[Tensor], empty: Tensor | None = None) -> Tensor:
        width = self._encoder.texts(["a"]).shape[1] if empty is None else 0
        none = torch.zeros(0, width) if empty is None else empty
        return collectives.gather_rows(torch.cat(pieces) if pieces else none, self._world)
