"""How well a recipe's 8-bit teacher agrees with the same one in full precision, on the first batch that its run trains on."""

from __future__ import annotations

from typing import Any

import torch

from megakd.data import mixture
from megakd.data.pairs import train_batches
from megakd.data.shards import ShardSet
from megakd.data.transforms import TowerView, normalise
from megakd.models import clip, streaming
from megakd.models.embeddings import Embeddings
from megakd.models.fingerprint import preprocessing
from megakd.models.int8 import matmul
from megakd.models.int8.agreement import Agreement, agreement
from megakd.recipe import Recipe
from megakd.runtime.launch import World
from megakd.teachers import build
from megakd.teachers.base import padded


def on_first_batch(content: dict[str, Any]) -> tuple[Agreement, str]:
    """The agreement, and how products are computed. content: a recipe as a run.json holds it, whose teacher is in 8 bit.

    Both teachers embed the pairs in the augmentation and the order of the run, on this machine's CPU.
    """
    recipe = Recipe.model_validate(content)
    assert recipe.teacher is not None
    world = World(0, 1, torch.device("cpu"))
    description = clip.resolve(recipe.teacher, "teacher")
    shards = ShardSet.open(recipe.data, 0, 1, lambda: None)
    order = mixture.order_of_pairs(len(shards), shards.sources, recipe.optim.batch, recipe.seed, recipe.data.block, recipe.data.window)
    view = TowerView(preprocessing(description), padded(description))
    with train_batches(
        shards, order, recipe.views, {"teacher": view}, rank=0, world=1, start_position=0, workers=0, pin_memory=False
    ) as batches:
        batch = next(batches)
    pixels = normalise(batch.pixels["teacher"], view.preprocess, torch.float32)
    product = matmul.resolved(recipe.teacher.int8_product, world.device)

    def embedded(int8: streaming.Int8 | None, mode: str) -> tuple[Embeddings, float]:
        settings = recipe.teacher.model_copy(update={"mode": mode})  # type: ignore[union-attr]
        torch.manual_seed(recipe.seed + 1)  # as `live_teacher` does: random weights are the same in both
        teacher = build.load(clip.resolve(settings, "teacher"), world, int8)
        return teacher.embed(pixels, batch.tokens["teacher"]), float(teacher.scale)

    whole, scale = embedded(None, recipe.teacher.placement)
    narrow, _ = embedded(streaming.Int8(recipe.teacher.outlier_threshold, product), recipe.teacher.mode)
    return agreement(narrow.image, whole.image, narrow.text, whole.text, scale), product
