"""`megakd embed --check` of embeddings that lie in the shards: the live teachers see the recorded views and captions of some samples.

Whoever downloads DataCompDR's images anew may have other pixels than those that were embedded, and a recipe may name other teachers, or
theirs in another order: nothing in the shards tells, but the embeddings.

Legend: N samples, T captions of them, D a teacher's width, W width of a row.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megakd.data.bad_samples import located, usable
from megakd.data.reinforced.replay import recorded_image
from megakd.data.shards import Sample, ShardSet
from megakd.data.store.manifest import StoreError
from megakd.data.transforms import TowerView, normalise
from megakd.models import clip
from megakd.models.fingerprint import preprocessing
from megakd.recipe import Recipe
from megakd.recipe.models import IN_SHARDS
from megakd.runtime import collectives
from megakd.runtime.console import with_progress
from megakd.runtime.launch import World
from megakd.teachers.base import settings_of
from megakd.teachers.build import live_teacher, members_beside, open_shards

# A row whose cosine is below it, both taken from the mean of the stored rows, is taken for one of another view, caption or teacher: to
# random towers all images are nearly alike, and to trained ones two views of an image are. The tests' teachers come to 1.000000, and
# what trained ones make of images that were downloaded and encoded anew has not been measured here.
LEAST_COSINE = 0.95
CENTRED = 8  # rows that have a mean to speak of
_SPELLED = {"image": "images", "text": "captions"}


@dataclass(frozen=True)
class Cosines:
    """Of one teacher's part of the stored rows with what it makes of them itself. image: (N,), text: (T,); sample: (T,), of each text.

    from_mean: image and text by name, both rows taken from the mean of the stored ones. elsewhere: of the images, the mean of those to each
    other teacher's part of the same width, by its role.
    """

    role: str
    image: Tensor
    text: Tensor
    from_mean: dict[str, Tensor]
    sample: Tensor
    elsewhere: dict[str, float]

    def low(self, kind: str) -> float:
        """Share of the rows below LEAST_COSINE."""
        return float((~(self.from_mean[kind] >= LEAST_COSINE)).float().mean())


class ShardsCheck:
    """One check, everything found that needs no model. Every rank computes all of it: a sharded teacher communicates."""

    def __init__(self, recipe: Recipe, world: World, images: int) -> None:
        """images: in one forward. Raises ValueError where the recipe's teachers do not read the shards, and as `open_shards` does."""
        self.recipe, self.world, self.images = recipe, world, images
        if recipe.teacher is None or recipe.teacher.store != IN_SHARDS:
            raise ValueError(f"--out {IN_SHARDS}: means embeddings in the shards, which a recipe with teacher.store = {IN_SHARDS!r} reads")
        if recipe.teacher.store_of != "all":
            raise ValueError(f"--out {IN_SHARDS}: teacher.store_of = 'text' reads no images; check with --set teacher.store_of=all")
        self.models = {role: clip.resolve(settings, role) for role, settings in recipe.teachers().items()}
        self.shards = ShardSet.open(recipe.data, world.rank, world.size, lambda: collectives.barrier(world), further=members_beside(recipe))
        self.store = open_shards(recipe, self.shards, world)
        self._say(self.store.outline())

    def check(self, samples: int) -> list[Cosines]:
        """Compare so many random samples, each in one of its views and with all its captions, and say what was found.

        Raises StoreError, with the likely reasons, where more than data.max_bad_fraction of the images or captions of a teacher have a
        cosine below LEAST_COSINE, or where no sample can be read.
        """
        seed = cast(int, collectives.share(random.SystemRandom().getrandbits(64), self.world))
        draws = random.Random(seed)
        chosen = sorted(draws.sample(range(len(self.shards)), min(samples, len(self.shards))))
        items = self._items(chosen, draws)
        found = [self._compare(role, items) for role in self.models]
        for one in found:
            self._say(self._line(one, items))
        limit = self.recipe.data.max_bad_fraction
        wrong = [(one, kind) for one in found for kind in ("image", "text") if one.low(kind) > limit]
        if wrong:
            told = ", ".join(f"{one.low(kind):.1%} of the {_SPELLED[kind]} of {one.role}" for one, kind in wrong)
            raise StoreError(
                f"{IN_SHARDS}: {told} have a cosine below {LEAST_COSINE}, from the mean row, to what the live teacher gives, more than "
                f"data.max_bad_fraction = {limit}. {self._reasons(found, {(one.role, kind) for one, kind in wrong})}"
            )
        return found

    def _items(self, chosen: list[int], draws: random.Random) -> _Items:
        policy, sizes = self.shards.captions, {role: TowerView(preprocessing(model), model.tokenize) for role, model in self.models.items()}
        pixels: dict[str, list[Tensor]] = {role: [] for role in self.models}
        items = _Items([], sizes, pixels, [], [], [], [])

        def to_row(index: int, sample: Sample) -> None:
            with located(sample.where):
                captions = policy.read(sample.members)
                held = self.store.held(sample.members, captions)
                view, image = draws.randrange(len(held.views)), recorded_image(sample.members["image"], self.shards.data)
                image_W, text_TW = self.store.unit(held.image[view : view + 1])[0], self.store.unit(torch.stack(held.text))
                seen = {role: held.views[view].pixels(image, one.train_pixels, self.store.recorded) for role, one in sizes.items()}
            for role, values in seen.items():
                pixels[role].append(torch.from_numpy(np.ascontiguousarray(values)))
            items.owner.extend([len(items.samples)] * len(captions.texts))
            items.texts.extend(captions.texts)
            items.image.append(image_W)
            items.text.append(text_TW)
            items.samples.append(index)

        needs = ("image", *policy.needs, *self.store.needs)
        read = with_progress(self.shards.read_each(chosen, needs), "reading samples", "samples", len(chosen))
        made = usable(chosen, read, to_row)
        if made.bad.total:
            self._say(f"{made.bad.total} of {len(chosen)} samples cannot be used: {made.bad.by_reason()}; {made.bad.example}")
        if not items.samples:
            raise StoreError(f"{IN_SHARDS}: none of {len(chosen)} samples could be read to be compared: {made.bad.example}")
        return items

    def _compare(self, role: str, items: _Items) -> Cosines:
        model, device = self.models[role], self.world.device
        teacher = live_teacher(self.recipe, model, self.world, self.shards, piece=self.images, say=self._say)
        view = items.views[role]
        tokens = view.tokenize(items.texts).long()
        images_ND = torch.cat([
            teacher.embed_images(normalise(torch.stack(piece).to(device), view.preprocess, teacher.dtype)).double().cpu()
            for piece in (items.pixels[role][start : start + self.images] for start in range(0, len(items.samples), self.images))
        ])  # fmt: skip
        texts_TD = torch.cat([teacher.embed_texts(piece.to(device)).double().cpu() for piece in tokens.split(self.images)])
        stored_NW, stored_TW = torch.stack(items.image).double(), torch.cat(items.text).double()

        def to_part(other: str, live: Tensor, stored: Tensor, *, from_mean: bool) -> Tensor:
            part = stored[:, self.store.columns(other)]
            mean = part.mean(0) if from_mean and len(items.samples) >= CENTRED else torch.zeros_like(part[0])
            return functional.cosine_similarity(live - mean, part - mean)

        others = [other for other, width in self.store.widths.items() if other != role and width == model.width]
        elsewhere = {other: float(to_part(other, images_ND, stored_NW, from_mean=True).mean()) for other in others}
        plain, centred = (
            {"image": to_part(role, images_ND, stored_NW, from_mean=how), "text": to_part(role, texts_TD, stored_TW, from_mean=how)}
            for how in (False, True)
        )
        return Cosines(role, plain["image"], plain["text"], centred, torch.tensor(items.owner), elsewhere)

    def _line(self, one: Cosines, items: _Items) -> str:
        settings, columns = settings_of(self.models[one.role]), self.store.columns(one.role)
        parts = []
        for kind, rows in (("image", one.image), ("text", one.text)):
            worst = int(one.from_mean[kind].argmin())
            where = self.shards.where(items.samples[worst if kind == "image" else int(one.sample[worst])])
            parts.append(
                f"{len(rows)} {_SPELLED[kind]}: cosine mean {float(rows.mean()):.6f}, worst {float(rows.min()):.6f}; from the mean row "
                f"{float(one.from_mean[kind].mean()):.6f}, worst {float(one.from_mean[kind].min()):.6f} ({where})"
            )
        called = " ".join(filter(None, (settings.model or "own architecture", settings.pretrained)))
        return f"{one.role} ({called}), columns {columns.start} to {columns.stop - 1}: " + "; ".join(parts)

    def _reasons(self, found: list[Cosines], wrong: set[tuple[str, str]]) -> str:
        """What it likely is, by which rows differ."""
        for one in found:
            near = [other for other, cosine in one.elsewhere.items() if cosine >= LEAST_COSINE]
            if near and (one.role, "image") in wrong:
                return f"{one.role} is the teacher whose columns {near[0]} reads: exchange the two in the recipe"
        images, texts = ({role for role, kind in wrong if kind == name} for name in ("image", "text"))
        roles = {one.role for one in found}
        if images == roles and not texts:
            return (
                "Captions agree, so it is the images: another download than the one that was embedded (resized, re-encoded, faces blurred, "
                "or a link that shows another picture by now), or images that were turned upright"
            )
        if texts == roles and not images:
            return "Images agree, so it is the captions: other texts than those that were embedded, or the teachers' tokenizers"
        if images | texts != roles:
            return (
                f"The others agree, so it is {', '.join(sorted(images | texts))}: other weights than those that embedded the shards, or "
                "weights of a -quickgelu model under the name without it"
            )
        return (
            "Other teachers than those that embedded the shards, weights of a -quickgelu model under the name without it, or images and "
            "captions of other samples"
        )

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


@dataclass(frozen=True)
class _Items:
    """samples: N indexes; views: of each teacher; pixels: N of each teacher, (3, H, W) uint8; image: N rows (W,).

    texts: T captions, owner: of each the place of its sample among N; text: N tensors with (W,) rows of a sample's captions.
    """

    samples: list[int]
    views: dict[str, TowerView]
    pixels: dict[str, list[Tensor]]
    texts: list[str]
    owner: list[int]
    image: list[Tensor]
    text: list[Tensor]
