"""`megakd embed`: a teacher's embeddings of the training set, V views of each image and every caption that may be drawn, into a store.

With `teacher.patch_grid` also the patch tokens of each view that the recipe's objectives read, averaged to that grid.

1. `store_key` says what they depend on; rank 0 says the store's size, holds its lock, lists the parts that are not there yet, and compares
   them with what is free on the disk.
2. Each rank takes every world-th of those, embeds them and renames them into place: killed at any moment, the same command goes on.
3. Rank 0 writes the checksums. `check` reads all values again and recomputes a random sample of them.

Legend: N samples of a part, n samples of a chunk, T captions of them (N or n where each has one), V views, D embedding width.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from megakd.data.caption_survey import captions_told
from megakd.data.shards import ShardSet
from megakd.data.store import reader as stores
from megakd.data.store import writer
from megakd.data.store.reader import Layout, Manifest, Store, StoreError, StoreType
from megakd.data.store.views import Seen, StoredViews
from megakd.data.store.writer import StoreLock
from megakd.data.transforms import TowerView, normalise
from megakd.models import clip, image_only
from megakd.models.embeddings import Embeddings
from megakd.models.fingerprint import computation, preprocessing
from megakd.recipe import Recipe
from megakd.recipe import load as recipes
from megakd.recipe.models import IN_SHARDS
from megakd.runtime import collectives, ds_config, launch, precision, shared_folder
from megakd.runtime.console import LongWork, with_progress
from megakd.runtime.launch import World
from megakd.teachers.base import LiveTeacher, padded
from megakd.teachers.build import live_teacher, open_store, patch_layout, store_key
from megakd.teachers.check_shards import ShardsCheck
from megakd.teachers.embed_request import EmbedRequest

# Rows of the tests' teacher, recomputed and rounded to bf16, are at .999997 and better; a flipped image's was seen at .87.
WORST_COSINE = 0.999


@dataclass(frozen=True)
class Checked:
    """What a check found. cosines of recomputed against stored rows, images and texts alike; where: the worst row."""

    samples: int
    mean_cosine: float
    worst_cosine: float
    where: str


def run(recipe: str, request: EmbedRequest, *, check: bool, overrides: list[str]) -> None:
    """Make the store, or check the one that is there. Starts under torchrun, deepspeed and srun as well.

    Raises ValueError when recipe and store do not match, when another job writes it, when a check fails, when the disk is full.
    """
    loaded = recipes.load(recipe, overrides)[0]
    world = launch.start()
    try:
        if str(request.out) == IN_SHARDS:
            if not check:
                raise ValueError(
                    f"--out {IN_SHARDS}: the embeddings of these shards are in them, and are not written; --check compares them with the "
                    "live teachers"
                )
            ShardsCheck(loaded, world, images_a_forward(loaded, request.ds_config, world)).check(request.samples)
            return
        job = EmbedJob(loaded, request, world)
        if check:
            job.check(request.samples)
        else:
            job.embed()
    finally:
        launch.stop()


class EmbedJob:
    """One `megakd embed`, everything checked that needs no model. part: samples a part, by default what suits the data."""

    def __init__(self, recipe: Recipe, request: EmbedRequest, world: World, part: int | None = None) -> None:
        self.request, self.world, self.recipe, self._part_size = request, world, recipe, part
        if self.recipe.teacher is None:
            raise ValueError("the recipe has no [teacher]: there is nobody to embed the data; add the section")
        self.description = clip.resolve(self.recipe.teacher, "teacher")
        if not self.description.has_text:
            raise ValueError(f"teacher.model: {image_only.no_store(self.recipe.teacher, 'teacher')}")
        self._patches, _ = patch_layout(self.recipe, self.description)
        readers = list(self.recipe.teacher_blocks().values())
        if self.recipe.teacher.patch_grid is not None and not readers:
            raise ValueError(
                f"teacher.patch_grid = {list(self.recipe.teacher.patch_grid)}: no active objective reads patch tokens, so there is "
                f"no block to store them of; give one that does, such as objectives.patch, a weight, or take the grid out"
            )
        if readers and self._patches is None:
            self._say(f"objectives.{readers[0]} reads patch tokens, which this store will not hold: that needs teacher.patch_grid")
        self.images = images_a_forward(self.recipe, request.ds_config, world)
        self.shards = ShardSet.open(self.recipe.data, world.rank, world.size, lambda: collectives.barrier(world))
        self._tower = TowerView(preprocessing(self.description), padded(self.description))
        for line in captions_told(self.shards, world, read=True):
            self._say(line)
        seed = self.recipe.views.seed_in(self.recipe.seed)
        self._source = StoredViews(self.shards, self.recipe.views, seed, self._tower, every=True)

    def embed(self) -> Manifest:
        """Embed what the store does not have yet. Returns the manifest of the complete store."""
        folder, world = self.request.out, self.world
        with contextlib.ExitStack() as held:
            manifest, todo = collectives.by_main(lambda: self._begin(held), world)
            for line in shared_folder.check(folder, world):
                self._say(line)
            written = manifest if manifest is not None and not todo else self._embed(manifest, todo)
            complete = collectives.by_main(lambda: writer.finish(folder, written), world)
        known = sum(part["known"] for part in complete.parts)
        missing = len(self.shards) - known
        unusable = f"; {missing} samples cannot be used and are missing in it" if missing else ""
        self._say(f"{folder}: complete, {known} samples in {len(complete.parts)} parts, {self.request.views} views each{unusable}")
        return complete

    def _begin(self, held: contextlib.ExitStack) -> tuple[Manifest | None, list[int]]:
        """Rank 0's work: take the lock, and find the manifest that is there and the numbers of the parts that are not."""
        folder, layout = self.request.out, self._layout()
        self._say(f"{folder}: {layout}")
        held.enter_context(StoreLock(folder))
        self._key = store_key(self.recipe, self.description, self.shards)
        found = writer.existing(folder, self._key, self._made(), layout)
        todo = list(range(layout.parts)) if found is None else writer.parts_to_do(folder, found)
        self._say(f"{folder}: {layout.parts - len(todo)} of {layout.parts} parts are there")
        writer.check_room(folder, layout, todo)
        return found, todo

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def _layout(self) -> Layout:
        samples, dtype = len(self.shards), cast(StoreType, self.request.dtype)
        layout = writer.in_parts(
            Layout(samples, samples, self.request.views, self.description.width, dtype, self._patches, self.shards.captions.stored)
        )
        return layout if self._part_size is None else replace(layout, part=self._part_size)

    def _made(self) -> dict[str, Any]:
        """How the embeddings are computed: parts that were computed otherwise do not go into one store."""
        return computation(self.description, self.world.device)

    def _teacher(self) -> LiveTeacher:
        return live_teacher(self.recipe, self.description, self.world, self.shards, piece=self.images, say=self._say)

    def _embed(self, manifest: Manifest | None, todo: list[int]) -> Manifest:
        world, layout, folder = self.world, self._layout(), self.request.out
        teacher = self._teacher()
        if manifest is None:
            scale, bias = float(teacher.scale), None if teacher.bias is None else float(teacher.bias)
            manifest = collectives.by_main(lambda: writer.start(folder, Manifest(self._key, self._made(), layout, scale, bias)), world)
        mine = sum(layout.count(number) for number in todo[world.rank :: world.size])
        asked = [[chunk for number in todo[rank :: world.size] for chunk in self._chunks(layout, number)] for rank in range(world.size)]
        open_part: _Part | None = None
        with LongWork("embedding", mine, "samples") as work:
            for chunk, seen, found in self._run(teacher, asked, layout.views):
                if open_part is None or open_part.number != chunk.number:
                    open_part = _Part(layout, chunk.number)
                open_part.add(seen, found)
                if chunk.last:
                    open_part.write(folder, manifest)
                work.advance(len(chunk.index_n))
        collectives.barrier(world)
        return manifest

    def _chunks(self, layout: Layout, number: int) -> list[_Chunk]:
        """The part in pieces of one forward each: the same for every number of ranks, or the last bits of the values would differ."""
        step, first, end = max(1, self.images // layout.views), number * layout.part, number * layout.part + layout.count(number)
        return [_Chunk(number, np.arange(start, min(start + step, end)), start + step >= end) for start in range(first, end, step)]

    def _run(self, teacher: LiveTeacher, asked: list[list[_Chunk]], views: int) -> Iterator[tuple[_Chunk, Seen, Embeddings]]:
        """This rank's chunks with their embeddings. Every rank makes as many forwards as the busiest: a sharded teacher communicates."""
        mine = asked[self.world.rank]
        wanted = [(chunk.index_n, np.tile(np.arange(views), (len(chunk.index_n), 1))) for chunk in mine]
        with contextlib.closing(
            self._source.stream(wanted, min(self.recipe.data.workers, len(mine)), self.world.device.type == "cuda")
        ) as stream:
            for place in range(max(map(len, asked))):
                seen = next(stream) if place < len(mine) else None
                found = self._forward(teacher, seen)
                if seen is not None:
                    yield mine[place], seen, found

    def _forward(self, teacher: LiveTeacher, seen: Seen | None) -> Embeddings:
        """image (n * V, D), text (T, D) and patch tokens (n * V, h, w, C) of a chunk, on the CPU; of a blank pair for no sample."""
        if seen is None or len(seen.index) == 0:
            height, width, _ = self._tower.train_pixels
            pixels, tokens = torch.zeros((1, 3, height, width), dtype=torch.uint8), self._tower.tokenize([""]).long()
        else:
            pixels, tokens = seen.pixels.flatten(0, 1), seen.tokens
        device = self.world.device
        normalised = normalise(pixels.to(device, non_blocking=True), self._tower.preprocess, teacher.dtype)
        blocks = () if self._patches is None else tuple(self._patches.widths)
        found = teacher.embed(normalised, tokens.to(device, non_blocking=True), blocks)
        features = {name: rows.cpu() for name, rows in found.features.items()}
        return found._replace(image=found.image.cpu(), text=found.text.cpu(), features=features)

    def check(self, sampled: int = EmbedRequest.samples) -> Checked:
        """Read every value again, and recompute a random sample of them.

        Raises StoreError when a part is missing or damaged, or when a recomputed row is not the stored one.
        """
        world, folder = self.world, self.request.out
        store = open_store(folder, self.recipe, self.description, self.shards, world)
        if store.layout.views != self.request.views:
            raise StoreError(f"{folder}: this store holds {store.layout.views} views of each image, not --views {self.request.views}")
        if store.layout.patches != self._patches:
            held, wanted = (f"{one or 'no patch tokens'}" for one in (store.layout.patches, self._patches))
            raise StoreError(f"{folder}: this store holds {held}, and the recipe's teacher.patch_grid and objectives ask for {wanted}")
        store.asked = {} if self._patches is None else {block: block for block in self._patches.widths}
        self._check_values(store)
        # a share for each rank of samples that every rank draws alike
        seed = cast(int, collectives.share(random.SystemRandom().getrandbits(64), world))
        chosen = np.array(sorted(random.Random(seed).sample(range(len(self.shards)), min(sampled, len(self.shards)))))
        step = max(1, self.images // store.layout.views)
        chunks = [_Chunk(0, chosen[start : start + step], False) for start in range(0, len(chosen), step)]
        asked = [chunks[rank :: world.size] for rank in range(world.size)]
        teacher = self._teacher()
        recomputed = with_progress(self._run(teacher, asked, store.layout.views), "recomputing", "pieces", len(asked[world.rank]))
        compared = [_compared(store, seen, found) for _, seen, found in recomputed]
        rows = collectives.gather_rows(torch.cat(compared) if compared else torch.zeros((0, 4), dtype=torch.float64), world)
        return self._judge(store, rows, len(chosen))

    def _check_values(self, store: Store) -> None:
        """Every part is there, and its values have the checksum that they were written with."""
        store.check_whole()
        damaged = [
            number
            for number in with_progress(range(self.world.rank, store.layout.parts, self.world.size), "checksums of the store", "parts")
            if stores.content_digest(stores.map_part(store.folder, store.manifest, number, store.parts[number]))
            != store.parts[number].sha256
        ]
        found = sorted(int(number) for number in collectives.gather_rows(torch.tensor(damaged, dtype=torch.int64), self.world))
        if found:
            names = ", ".join(str(stores.part_path(store.folder, number)) for number in found[:4])
            raise StoreError(
                f"{len(found)} parts were changed after they were written (checksum): {names}; remove them and run `megakd embed` again"
            )

    def _judge(self, store: Store, rows: Tensor, samples: int) -> Checked:
        """rows: (number, 4), as `_compared` of all ranks."""
        if len(rows) == 0:
            raise StoreError(f"{store.folder}: none of {samples} samples could be read to be compared; are the shards still readable?")
        index, view, block, cosine = rows[int(rows[:, 3].argmin())].tolist()
        where = f"{self.shards.where(int(index))}, {_spelled(int(view))}"
        where += f", patch tokens of block {int(block)}" if block >= 0 else ""
        checked = Checked(samples, float(rows[:, 3].mean()), cosine, where)
        numbers = f"cosine mean {checked.mean_cosine:.6f}, worst {cosine:.6f} ({where})"
        if not cosine >= WORST_COSINE:
            raise StoreError(
                f"{store.folder}: recomputed embeddings differ from the stored ones: {numbers}, at least {WORST_COSINE} is expected. Were "
                f"data or programs changed since? Make the store anew in another folder"
            )
        self._say(f"{store.folder}: the values of all {store.layout.parts} parts are as they were written")
        self._say(f"{samples} random samples recomputed: {numbers}")
        return checked


def _spelled(view: int) -> str:
    return f"view {view}" if view >= 0 else "caption" if view == -1 else f"caption {-view}"


def images_a_forward(recipe: Recipe, config: str | None, world: World) -> int:
    """The JSON's micro-batch where it has one, else evaluation.batch: never a rank's share of the batch, which depends on the ranks."""
    literal = ds_config.read(config, precision.of(world.device))[0].get("train_micro_batch_size_per_gpu", "auto")
    return literal if isinstance(literal, int) and literal > 0 else recipe.evaluation.batch


@dataclass(frozen=True)
class _Chunk:
    """Samples of one forward, and whether they end their part."""

    number: int
    index_n: NDArray[np.int64]
    last: bool


class _Part:
    """A part that fills up, in the order of its samples."""

    def __init__(self, layout: Layout, number: int) -> None:
        shapes = layout.shapes(number)
        self.number, self._layout, self._first = number, layout, number * layout.part
        self._image_NVD = torch.zeros(shapes["image"], dtype=layout.torch_dtype)
        self._texts: list[Tensor] = [torch.zeros((0, layout.width), dtype=layout.torch_dtype)]
        self._captions_N = torch.zeros(shapes["known"], dtype=torch.int64)  # 0 of what could not be used
        self._patches = {name: torch.zeros(shapes[name], dtype=layout.torch_dtype) for name in layout.patch_tensors}

    def add(self, seen: Seen, found: Embeddings) -> None:
        """Rows of samples that could be used; the others stay unknown."""
        if len(seen.index) == 0:
            return
        rows = seen.index - self._first
        self._image_NVD[rows] = found.image.view(len(rows), *self._image_NVD.shape[1:]).to(self._image_NVD.dtype)
        self._texts.append(found.text.to(self._image_NVD.dtype))
        self._captions_N[rows] = seen.captions
        for name, map_NVhwC in self._patches.items():
            map_NVhwC[rows] = found.features[name].view(len(rows), *map_NVhwC.shape[1:]).to(map_NVhwC.dtype)

    def write(self, folder: Path, manifest: Manifest) -> None:
        text_TD, known_N, several = torch.cat(self._texts), self._captions_N > 0, self._layout.captions is not None
        if not several:
            text_TD = torch.zeros((len(known_N), self._layout.width), dtype=text_TD.dtype).masked_scatter(known_N[:, None], text_TD)
        captions_N = self._captions_N if several else None
        writer.write_part(folder, manifest, self.number, self._image_NVD, text_TD, known_N, self._patches, captions_N)


def _compared(store: Store, seen: Seen, found: Embeddings) -> Tensor:
    """(rows, 4) float64: sample, view, block (-1 for an embedding), cosine of what was recomputed to what is stored, where both are there.

    In the place of a view stands -1 - n for the sample's caption number n. Patch tokens of a view are compared as one vector.
    """
    count, views = len(seen.index), store.layout.views
    if count == 0:
        return torch.zeros((0, 4), dtype=torch.float64)
    index_R = seen.index.repeat_interleave(views)
    view_R = torch.arange(views).repeat(count)
    stored = store.read(index_R.numpy(), view_R.numpy())
    image = F.cosine_similarity(found.image.double(), stored.image.double())
    index_T = seen.index.repeat_interleave(seen.captions)
    number_T = torch.cat([torch.arange(int(captions)) for captions in seen.captions])
    said = store.read(index_T.numpy(), np.zeros(len(index_T), np.int64), number_T.numpy())
    text = F.cosine_similarity(found.text.double(), said.text.double())
    none_R, none_T = torch.full((count * views,), -1), torch.full((len(index_T),), -1)
    rows = [torch.stack([index_R, view_R, none_R, image], 1)[stored.known]]
    rows += [torch.stack([index_T, -1 - number_T, none_T, text], 1)[said.known]]
    for block, map_RhwC in stored.patches.items():
        cosine = F.cosine_similarity(found.features[f"patches.{block}"].double().flatten(1), map_RhwC.double().flatten(1))
        rows.append(torch.stack([index_R, view_R, torch.full_like(none_R, block), cosine], 1)[stored.known])
    return torch.cat(rows)
