"""Where a run's teacher embeddings come from: a live teacher in one of its modes, or a store with the live teacher behind it.

What a store must agree on with the recipe is decided here, for the run that reads it and for `megakd embed` that fills it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from megakd.data.shards import ShardSet
from megakd.data.store import Store
from megakd.data.stored_views import StoredViews
from megakd.data.views import TowerView, normalise
from megakd.models import streaming, towers
from megakd.models.identity import identity, preprocessing
from megakd.models.sharded_teacher import ShardedTeacher, build_sharded_teacher
from megakd.models.stored_teacher import StoredTeacher, StoreMiss, TextStoredTeacher
from megakd.models.teacher import ReplicatedTeacher, build_teacher
from megakd.recipe import Recipe
from megakd.recipe import Teacher as Settings
from megakd.runtime import collectives, partition, precision
from megakd.runtime.launch import World

T = TypeVar("T")
# What of a store's key an image's embedding depends on and a text's does not.
AUGMENTATION = ("views.", "seed")


def live_teacher(
    recipe: Recipe, description: towers.Description, world: World, *, without_text: bool = False
) -> ReplicatedTeacher | ShardedTeacher:
    """The teacher of `description`, loaded as its `mode` says. A collective: every rank calls it.

    without_text: its images alone; no weight of the text tower is read.
    pretrained = "random" draws the same weights on every rank and at every start. Raises ValueError, on every rank, for weights that
    do not fit or cannot be read, and for a DeepSpeed JSON that a partitioned teacher cannot use.
    """
    settings = settings_of(description)
    torch.manual_seed(recipe.seed + 1)
    int8 = streaming.Int8(settings.outlier_threshold) if settings.mode.endswith("int8") else None
    if settings.mode.startswith("zero3"):
        return build_sharded_teacher(
            description, world, partition.settings(settings.ds_config, offload=settings.offload), int8=int8, without_text=without_text
        )
    if int8 is None and not without_text:
        return build_teacher(description, world.device)
    return ReplicatedTeacher(streaming.load(description, world, precision.of(world.device), int8=int8, without_text=without_text))


def settings_of(description: towers.Description) -> Settings:
    assert isinstance(description.settings, Settings), "described from [teacher] or [ensemble] of a recipe"
    return description.settings


def store_key(recipe: Recipe, description: towers.Description, shards: ShardSet) -> dict[str, Any]:
    """All that embeddings in a store depend on, as plain JSON. Reads the teacher's weights for their checksum: rank 0's work."""
    data = {
        "signature": shards.signature,
        "samples": len(shards),
        "bytes": sum(stat.size for stat in shards.stats),
        "caption": recipe.data.caption,
    }
    augmentation = {"views": recipe.views.model_dump(mode="json"), "seed": recipe.seed}
    key = {**identity(description, recipe.seed), **augmentation, "data": data}
    return cast(dict[str, Any], json.loads(json.dumps(key)))  # as it comes back from a manifest: tuples are lists


def open_store(
    folder: Path,
    recipe: Recipe,
    description: towers.Description,
    shards: ShardSet,
    world: World,
    miss: StoreMiss = "teacher",
    text_alone: bool = False,
) -> Store:
    """The store for a run of `recipe`, opened by rank 0 and sent to all.

    Raises StoreError on every rank when there is none, when it does not match the recipe, with the differences, and when parts of it
    are not usable while misses are to fail.
    """

    def opened() -> Store:
        found, key = Store.open(folder), store_key(recipe, description, shards)
        if found.manifest.key.get("data", {}).get("signature") == shards.signature_of_names:
            key["data"]["signature"] = shards.signature_of_names  # of a store from before the content was a part of it
        found.check_matches(key, ignore=AUGMENTATION if text_alone else ())
        if miss == "fail":
            found.check_whole()
        return found

    return collectives.by_main(opened, world)


def open_stores(recipe: Recipe, teachers: Mapping[str, towers.Description], shards: ShardSet, world: World) -> Store | None:
    """The store that the recipe names for its teacher, as `open_store`; None without one, or when no objective uses the teacher."""
    settings, description = recipe.teacher, teachers.get("teacher")
    if settings is None or settings.store is None or description is None:
        return None
    text_alone = settings.store_of == "text"
    return open_store(Path(settings.store), recipe, description, shards, world, settings.store_miss, text_alone)


def stored_teacher(
    store: Store, recipe: Recipe, description: towers.Description, shards: ShardSet, world: World, *, piece: int
) -> StoredTeacher | TextStoredTeacher:
    """The store as the run's teacher, or as its text tower. piece: images in one forward of the live teacher, where it is needed."""
    assert recipe.teacher is not None

    def reread(index_M: Tensor, view_M: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pixels, tokens = source.see_all(index_M.numpy(), view_M.numpy())
        return normalise(pixels.to(world.device), source.tower.preprocess, dtype), tokens.to(world.device)

    if recipe.teacher.store_of == "text":
        live = live_teacher(recipe, description, world, without_text=True)
        return TextStoredTeacher(live, store.manifest.scale, store.manifest.bias, world, shards.where)
    source = StoredViews(shards, recipe.views, store.manifest.seed, TowerView(preprocessing(description), description.tokenize))
    return StoredTeacher(
        width=store.layout.width,
        scale=store.manifest.scale,
        bias=store.manifest.bias,
        dtype=precision.dtype(precision.of(world.device)),
        world=world,
        miss=recipe.teacher.store_miss,
        build=lambda: live_teacher(recipe, description, world),
        reread=reread,
        where=shards.where,
        piece=piece,
    )
