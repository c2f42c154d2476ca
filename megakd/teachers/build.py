"""Where a run's teacher embeddings come from: a live teacher in one of its modes, or a store with the live teacher behind it.

What a store must agree on with the recipe is decided here, for the run that reads it and for `megakd embed` that fills it. So is whether
a teacher in 8 bit is near enough to the one in 16: some pairs of the training set go through both at every start.
"""

from __future__ import annotations

import json
import logging
import math
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from megakd.data.captions import CaptionPolicy
from megakd.data.reinforced.shards import ReinforcedShards, needed
from megakd.data.shards import ShardSet
from megakd.data.store.manifest import PatchLayout
from megakd.data.store.reader import Layout, Store, StoreError, differences, made_as_wanted
from megakd.data.store.views import Seen, StoredViews
from megakd.data.transforms import TowerView, input_size, normalise
from megakd.models import clip, compiled, streaming
from megakd.models.fingerprint import computation, fingerprint, preprocessing
from megakd.models.grids import averaged_shape
from megakd.models.int8 import matmul
from megakd.models.int8.agreement import Agreement, agreement
from megakd.models.int8.migration import METHOD, Reference, migrate
from megakd.models.patches import Read, measure, number_of
from megakd.recipe import Recipe
from megakd.recipe import Teacher as Settings
from megakd.recipe.credentials import redacted
from megakd.recipe.models import IN_SHARDS
from megakd.recipe.placements import PLACEMENTS
from megakd.runtime import collectives, precision, watchdog, zero3
from megakd.runtime.launch import World
from megakd.teachers.base import LiveTeacher, padded, settings_of
from megakd.teachers.cached import StoredTeacher, StoreMiss, TextStoredTeacher
from megakd.teachers.embed_request import EmbedRequest

log = logging.getLogger("megakd.teachers")
COMPARED = 64  # pairs that go through a teacher in 8 and in 16 bit
# What of a store's key an image's embedding depends on and a text's does not.
OF_PIXELS = ("views.", "seed", "data.orientation", "data.transparency", "data.decode", "data.resampling")


def live_teacher(
    recipe: Recipe,
    description: clip.ModelSpec,
    world: World,
    shards: ShardSet,
    *,
    piece: int,
    say: Callable[[str], None] = log.info,
    without_text: bool = False,
    reads: Collection[Read] = (),
) -> LiveTeacher:
    """The teacher of `description`, loaded as its `mode` says; in 8 bit, calibrated and compared with 16 bit. A collective.

    shards: of the recipe's data. piece: images in one forward of the comparison. say: where its outcome is told.
    without_text: its images alone; no weight of the text tower is read. reads: what objectives read of its image tower's blocks.
    pretrained = "random" draws the same weights on every rank and at every start. Raises ValueError, on every rank, for weights that
    do not fit or cannot be read, for a DeepSpeed JSON that a partitioned teacher cannot use, and for 8 bit that lose too much.
    """
    settings = settings_of(description)
    images_alone = without_text or not description.has_text
    torch.manual_seed(recipe.seed + 1)
    if settings.int8:
        product = matmul.resolved(settings.int8_product, world.device)
        int8 = streaming.Int8(settings.outlier_threshold, product, migrated=settings.calibration > 0)
        teacher = load(description, world, int8, without_text=without_text)
        tower = TowerView(preprocessing(description), description.tokenize)
        source = StoredViews(shards, recipe.views, recipe.views.seed_in(recipe.seed), tower, captions=description.has_text)
        _Comparison(teacher, description.role, settings, source, world, piece, images_alone).settle(say)
    else:
        teacher = load(description, world, without_text=without_text)
    if settings.compile:
        line, _ = compiled.compile_towers(teacher.towers.clip, description.role, world, reads, texts=not images_alone)
        say(line)
    return teacher


def load(description: clip.ModelSpec, world: World, int8: streaming.Int8 | None = None, *, without_text: bool = False) -> LiveTeacher:
    """The teacher with its weights, placed as its settings say; in 8 bit where `int8` says how. A collective."""
    return class_of(settings_of(description).placement).load(description, world, int8, without_text=without_text)


def class_of(placement: str) -> type[LiveTeacher]:
    """As `recipe/placements.py` declares: `ReplicatedTeacher` of replicated.py, or for "zero3" `ShardedTeacher` of sharded.py."""
    return cast(type[LiveTeacher], pkgutil.resolve_name(PLACEMENTS[placement].where))


def communicates(settings: Settings, world: World) -> bool:
    """Whether ranks talk over their devices where this teacher of a recipe is asked: a partitioned one gathers, and one is loaded for what
    its store lacks."""
    if world.size == 1:
        return False
    if settings.store is None or settings.store_of == "text":
        return class_of(settings.placement).gathers
    return settings.store != IN_SHARDS and settings.store_miss == "teacher"


@dataclass(frozen=True)
class _Comparison:
    """A teacher in 8 bit beside the same one with its original matrices in 16 bit, which are read again layer by layer.

    Its pairs are spread evenly over the training set, in the augmentation that a store calls view 0, and are the same for every number of
    ranks and at every start; those to compare lie between those to calibrate with. Every rank embeds all of them.
    """

    teacher: LiveTeacher
    role: str
    settings: Settings
    source: StoredViews
    world: World
    piece: int
    images_alone: bool

    def settle(self, say: Callable[[str], None]) -> None:
        """Calibrate, where the recipe asks for it, compare, and say the outcome. A collective; raises ValueError on every rank."""
        settings, originals = self.settings, self.teacher.towers.originals
        assert originals is not None, "an int8 teacher was read from weights"
        if not settings.calibration and not settings.int8_agreement:
            originals.close()
            return
        lines = []
        with Reference(originals) as reference:
            if settings.calibration:
                shown = self._pairs(settings.calibration, 0.0)
                reference.noting = True
                self._embedded(shown)
                reference.noting = False
            compared = self._pairs(COMPARED, 0.5) if settings.int8_agreement else None
            image, text = (None, None) if compared is None else self._embedded(compared)
        if settings.calibration:
            watchdog.beat(f"moving outliers of {self.role} into its weights")
            digest = migrate(originals, reference.largest, zero3.overwrite)
            lines.append(f"outliers moved into the weights by {len(shown.index)} pairs ({METHOD}; factors {digest[:12]})")
        if compared is not None and image is not None:
            own_image, own_text = self._embedded(compared)
            # Ranks on other machines may round otherwise; what the first one found counts.
            told = collectives.share(agreement(own_image, image, own_text, text, float(self.teacher.scale)), self.world)
            assert isinstance(told, Agreement)
            lines.append(f"compared with its matrices in {str(self.teacher.dtype).removeprefix('torch.')}: {told}")
            self._judge(told, lines)
        originals.close()
        product = next((layer.product for layer in originals.names), None)
        say(f"{self.role} in 8 bit ({product}): " + "; ".join(lines))

    def _judge(self, told: Agreement, lines: list[str]) -> None:
        settings, role = self.settings, self.role
        if settings.pretrained == clip.RANDOM:
            lines[-1] += " (random weights: there is nothing to lose, so no limit)"
            return
        if told.centred >= settings.int8_agreement:
            return
        if not math.isfinite(told.centred):
            raise ValueError(f"{role}: its embeddings of the training set are not finite; are the weights of {settings.model} whole?")
        if settings.calibration:
            other = f"a larger {role}.calibration than {settings.calibration}, {role}.outlier_threshold = 6.0"
        else:
            other = f"{role}.calibration = 64, which moves outliers into the weights"
        raise ValueError(
            f"{role}.mode = {settings.mode!r}: in 8 bit it loses too much, {lines[-1]}; {role}.int8_agreement asks for a centred cosine of "
            f"{settings.int8_agreement}. Set {other}, or {role}.int8_product = 'dequantise', or {role}.mode = "
            f"{settings.placement!r}; where that is good enough, lower {role}.int8_agreement"
        )

    def _pairs(self, count: int, shift: float) -> Seen:
        """Unaugmented but for a store's view 0, `count` of them where there are so many; read by the first rank."""

        def read() -> Seen:
            number = len(self.source.shards)
            index_N = np.unique(((np.arange(min(count, number)) + shift) * number / min(count, number)).astype(np.int64))
            seen = self.source.see(index_N, np.zeros((len(index_N), 1), np.int64))
            if len(seen.index) == 0:
                raise ValueError(
                    f"{self.role}: none of {len(index_N)} samples of the training set can be read, so its 8 bit cannot be compared with "
                    f"16: {seen.bad.example}"
                )
            return seen

        return collectives.by_main(read, self.world)

    def _embedded(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """(N, D) images and texts, the latter None where there is no text tower."""
        images, texts = [], []
        for start in range(0, len(seen.index), self.piece):
            watchdog.beat(f"comparing {self.role} with 16 bit")
            rows = slice(start, start + self.piece)
            pixels = normalise(seen.pixels[rows, 0].to(self.world.device), self.source.tower.preprocess, self.teacher.dtype)
            images.append(self.teacher.embed_images(pixels))
            if not self.images_alone:
                texts.append(self.teacher.embed_texts(seen.tokens[rows].to(self.world.device)))
        return torch.cat(images), torch.cat(texts) if texts else None


def store_key(recipe: Recipe, description: clip.ModelSpec, shards: ShardSet) -> dict[str, Any]:
    """All that embeddings in a store depend on, as plain JSON. Reads the teacher's weights for their checksum: rank 0's work."""
    data = {
        "signature": shards.signature,
        "samples": len(shards),
        "bytes": sum(stat.size for stat in shards.stats),
        **shards.captions.to_json(),
        **recipe.data.as_trained(),
    }
    if recipe.data.captions is None:
        data["caption"] = recipe.data.caption  # as it is spelled, which is what older stores have
    augmentation = {"views": recipe.views.policy(), "seed": recipe.views.seed_in(recipe.seed)}
    key = {**fingerprint(description, recipe.seed), **augmentation, "data": data}
    return cast(dict[str, Any], json.loads(json.dumps(redacted(key))))  # as it comes back from a manifest: tuples are lists


def open_store(
    folder: Path,
    recipe: Recipe,
    description: clip.ModelSpec,
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
        made = computation(description, world.device)
        found.check_matches(key, OF_PIXELS if text_alone else (), None if text_alone else made)
        # The text tower is not loaded, so its texts in 16 bit beside images in 8 are a choice, and said.
        if text_alone and (otherwise := differences({"made": made_as_wanted(found.manifest.made, made)}, {"made": made})):
            log.warning("the store's texts were computed otherwise than this run computes images: %s", "; ".join(otherwise))
        if miss == "fail":
            found.check_whole()
        return found

    return collectives.by_main(opened, world)


def patch_layout(recipe: Recipe, description: clip.ModelSpec) -> tuple[PatchLayout | None, dict[int, int]]:
    """What a store of this teacher has of patch tokens, None for nothing; and the store's number of each block that objectives read.

    Raises ValueError, naming the key, for a block that is not there and for a grid that is not one of the teacher's averages.
    """
    grid, role, readers = settings_of(description).patch_grid, description.role, recipe.teacher_blocks()
    if grid is None or not readers:
        return None, {}
    visual: Any = clip.on_meta(description).clip.visual
    numbers, widths = dict[int, int](), dict[int, int]()
    for block, name in readers.items():
        key = f"{role}: {name}.teacher_blocks"
        numbers[block] = number_of(visual, block, key)
        widths[numbers[block]] = averaged_shape(measure(visual, block, key), grid, f"{role}.patch_grid").width
    return PatchLayout(grid, widths), numbers


def patch_store(recipe: Recipe, description: clip.ModelSpec, samples: int) -> Layout | None:
    """Of what `megakd embed` writes for so many samples by default; None for what has no store, or one without patch tokens."""
    patches, _ = patch_layout(recipe, description) if description.has_text and not recipe.ensemble else (None, {})
    captions = CaptionPolicy.of(recipe.data).stored
    return None if patches is None else Layout(samples, samples, EmbedRequest.views, description.width, "bf16", patches, captions)


def _asked(store: Store, recipe: Recipe, description: clip.ModelSpec) -> dict[int, int]:
    """`Store.asked` for the recipe's objectives. Raises StoreError, on every rank alike, where the store does not hold that."""
    wanted, numbers = patch_layout(recipe, description)
    held = store.layout.patches
    if wanted is None or (held is not None and held.grid == wanted.grid and wanted.widths.keys() <= held.widths.keys()):
        return numbers
    remedy = "make one by this recipe with `megakd embed` in another folder, or set teacher.store_of to 'text'"
    if held is not None and held.grid != wanted.grid:
        remedy = f"set teacher.patch_grid to {list(held.grid)}, or {remedy}"
    raise StoreError(
        f"{store.folder}: objectives.{next(iter(recipe.teacher_blocks().values()))} reads {wanted}, and this store holds "
        f"{'embeddings alone' if held is None else held}; {remedy}"
    )


def members_beside(recipe: Recipe) -> tuple[str, ...]:
    """Extensions of what is read of a sample beside its image and caption: what holds its embeddings, where teachers read the shards."""
    reading = [teacher for teacher in recipe.teachers().values() if teacher.store == IN_SHARDS]
    return needed(reading[0].store_of == "all") if reading else ()


def open_shards(recipe: Recipe, shards: ShardSet, world: World) -> ReinforcedShards:
    """The embeddings that shards of data.train hold, for all teachers of the recipe. A collective: the first rank reads some samples.

    Raises ValueError on every rank where they hold none of the teachers' widths, and where nothing of what is needed is there.
    """
    models = {role: clip.resolve(settings, role) for role, settings in recipe.teachers().items()}
    sizes = [max(input_size(preprocessing(model))) for model in models.values()]
    assert recipe.teacher is not None, "a teacher reads them"
    replays = recipe.teacher.store_of == "all"
    asked = ReinforcedShards(shards.captions, {role: model.width for role, model in models.items()}, max(sizes), replays)
    return collectives.by_main(lambda: asked.looked_at(shards), world)


def open_stores(recipe: Recipe, teachers: Mapping[str, clip.ModelSpec], shards: ShardSet, world: World) -> Store | ReinforcedShards | None:
    """The store that the recipe names for its teacher, as `open_store`; None without one, or when no objective uses the teacher.

    Raises StoreError also where it lacks patch tokens that objectives read.
    """
    settings, description = recipe.teacher, teachers.get("teacher")
    if settings is not None and settings.store == IN_SHARDS and teachers:
        return open_shards(recipe, shards, world)
    if settings is None or settings.store is None or description is None:
        return None
    text_alone = settings.store_of == "text"
    store = open_store(Path(settings.store), recipe, description, shards, world, settings.store_miss, text_alone)
    return store if text_alone else replace(store, asked=_asked(store, recipe, description))


def stored_teacher(
    store: Store | ReinforcedShards,
    recipe: Recipe,
    description: clip.ModelSpec,
    shards: ShardSet,
    world: World,
    *,
    piece: int,
    say: Callable[[str], None] = log.info,
    reads: Collection[Read] = (),
) -> StoredTeacher | TextStoredTeacher:
    """The store as the run's teacher, or as its text tower. piece: images in one forward of the live teacher, where it is needed.

    say, reads: as in `live_teacher`.
    """
    settings = settings_of(description)
    if isinstance(store, ReinforcedShards):
        # Objectives see the recipe's scale, as `teacher_scale` has it; one that read this would end the run as not finite.
        scale, bias, columns, seed = math.nan, None, store.columns(description.role), recipe.views.seed_in(recipe.seed)
    else:
        scale, bias, columns, seed = store.manifest.scale, store.manifest.bias, slice(None), store.manifest.seed

    def reread(index_M: Tensor, view_M: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pixels, tokens = source.see_all(index_M.numpy(), view_M.numpy())
        return normalise(pixels.to(world.device), source.tower.preprocess, dtype), tokens.to(world.device)

    if settings.store_of == "text":
        live = live_teacher(recipe, description, world, shards, without_text=True, piece=piece, say=say, reads=reads)
        return TextStoredTeacher(live, scale, bias, world, shards.where, columns)
    source = StoredViews(shards, recipe.views, seed, TowerView(preprocessing(description), padded(description)))
    return StoredTeacher(
        width=description.width,
        scale=scale,
        bias=bias,
        dtype=precision.dtype(precision.of(world.device)),
        world=world,
        miss=settings.store_miss,
        build=lambda: live_teacher(recipe, description, world, shards, piece=piece, say=say),
        reread=reread,
        where=shards.where,
        piece=piece,
        columns=columns,
    )
