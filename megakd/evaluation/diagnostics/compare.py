"""Pairs shown to a student and its teachers, over all ranks, as the numbers of `pair`: what evaluation.json holds under "diagnostics".

A pair is an image and the first line of its text. Pairs whose image or caption came before are left out: equal columns have no order.
A live teacher is asked as in training, a micro-batch in a forward, and by every rank equally often, since a partitioned one communicates.

Legend: N pairs of a set, n of a batch, D embedding width, h x w a grid of patches, C a block's width.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megakd.data.bad_samples import BadCounter
from megakd.data.caption_tokens import plain_captions
from megakd.data.evaluation import EvaluationBatch, evaluation_batches
from megakd.data.shards import ShardSet
from megakd.data.transforms import TowerView, normalise
from megakd.evaluation.diagnostics import pair
from megakd.evaluation.diagnostics.cka import Moments
from megakd.evaluation.encoder import Encoder
from megakd.evaluation.sets import lost_in
from megakd.evaluation.suite import finite
from megakd.models import clip
from megakd.models.embeddings import Embeddings
from megakd.models.fingerprint import preprocessing
from megakd.models.grids import Grid, averaged_shape, common_grid, on_grid
from megakd.models.patches import TowerReader, Weights, measure
from megakd.runtime import collectives, watchdog
from megakd.runtime.console import with_progress
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.teachers.base import LiveTeacher, settings_of
from megakd.teachers.cached import TextStoredTeacher

log = logging.getLogger("megakd.evaluation")

BLOCK = -2  # of either vision tower: what a decoder and a question reader are shown by default


@dataclass(frozen=True)
class Shown:
    """A teacher that can be shown pairs. piece: images in one forward. grid: of the patches of both towers; None without a common one."""

    teacher: LiveTeacher | TextStoredTeacher
    description: clip.ModelSpec
    piece: int
    grid: Grid | None

    @classmethod
    def beside(
        cls,
        visual: nn.Module,
        description: clip.ModelSpec,
        teacher: LiveTeacher | TextStoredTeacher,
        piece: int,
        say: Callable[[str], None] = log.info,
    ) -> Shown:
        """Beside a student's vision tower, on torch's meta device perhaps. What cannot be compared with it is said once."""
        role, grid = description.role, None
        try:
            tower: Any = clip.on_meta(description).clip.visual
            own, other = (measure(one, BLOCK, f"{whose}: block") for whose, one in (("student", visual), (role, tower)))
            grid = common_grid(own, averaged_shape(other, settings_of(description).patch_grid, f"{role}.patch_grid"), "patches")
        except ValueError as error:
            say(f"evaluation.diagnostics: no cka_patch with {role}: {error}")
        if isinstance(teacher, TextStoredTeacher):
            say(f"evaluation.diagnostics: {role}'s text tower is not loaded, and its store has no texts of these sets: images alone")
        elif not teacher.has_text:
            say(f"evaluation.diagnostics: {role} sees images alone, and so do they")
        return cls(teacher, description, piece, grid)

    @property
    def has_text(self) -> bool:
        return isinstance(self.teacher, LiveTeacher) and self.teacher.has_text

    def see(self, pixels: Tensor, lines: list[str], device: torch.device, calls: int) -> Embeddings:
        """Of n pairs, on the device, in so many forwards on every rank. pixels: uint8, on the CPU."""
        tokenize, parts = plain_captions(self.description.tokenize), list[Embeddings]()
        blocks = () if self.grid is None else (BLOCK,)
        for start in range(0, calls * self.piece, self.piece):
            watchdog.beat(f"asking {self.description.role}")
            few, own = pixels[start : start + self.piece], lines[start : start + self.piece]
            # A rank that has no pair left shows an empty image, and drops what comes of it.
            filled = few if len(few) else pixels.new_zeros(1, *pixels.shape[1:])
            ready = normalise(filled.to(device, non_blocking=True), preprocessing(self.description), self.teacher.dtype)
            if isinstance(self.teacher, LiveTeacher):
                found = self.teacher.embed(ready, tokenize(own or ["nothing"]).to(device), blocks)
            else:
                image_nD, features = self.teacher.see(ready, blocks)
                found = Embeddings(image_nD, image_nD[:, :0], torch.tensor(math.nan), features=features)
            kept = {name: map_nhwC[: len(few)] for name, map_nhwC in found.features.items()}
            parts.append(found._replace(image=found.image[: len(few)], text=found.text[: len(few)], features=kept))
        return Embeddings.joined(parts)


@dataclass
class _Seen:
    """This rank's share of a set: what each model made of it, float32 on the CPU, and what is known of the pairs."""

    bad: BadCounter = field(default_factory=BadCounter)
    contents: list[tuple[int, int]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    image: dict[str, list[Tensor]] = field(default_factory=dict)
    text: dict[str, list[Tensor]] = field(default_factory=dict)
    scale: dict[str, Tensor] = field(default_factory=dict)
    patches: dict[str, Moments] = field(default_factory=dict)

    def add(self, role: str, image_nD: Tensor, text_nD: Tensor) -> None:
        self.image.setdefault(role, []).append(image_nD.detach().float().cpu())
        self.text.setdefault(role, []).append(text_nD.detach().float().cpu())


def compare(
    sets: Mapping[str, ShardSet],
    encoder: Encoder,
    teachers: Mapping[str, Shown],
    world: World,
    workers: int,
    interruptions: StopPoller,
) -> dict[str, Any]:
    """{set: {"pairs", "repeated", "unreadable", and the names of `pair.numbers`: a number each}}; with several teachers those of each are a
    table, by its role. A collective; the same on every rank.

    Raises ValueError, on every rank, when more of a set than data.max_bad_fraction is unreadable, when too few different pairs are left,
    and when an embedding is not finite; Interrupted as `StopPoller.check`.
    """
    return {name: _Comparison(encoder, teachers, world, workers, interruptions).of(shards, name) for name, shards in sets.items()}


@dataclass(frozen=True)
class _Comparison:
    encoder: Encoder
    teachers: Mapping[str, Shown]
    world: World
    workers: int
    interruptions: StopPoller

    def of(self, shards: ShardSet, name: str) -> dict[str, Any]:
        own, key = self._see(shards), f"evaluation.diagnostics.{name}"
        on_cpu = {role: moments.cpu() for role, moments in own.patches.items()}
        bad, contents, lines, patches = BadCounter(), list[tuple[int, int]](), list[str](), list[dict[str, Moments]]()
        for of_rank in collectives.everyones((own.bad, own.contents, own.lines, on_cpu), self.world):
            bad.merge(of_rank[0])
            contents += of_rank[1]
            lines += of_rank[2]
            patches.append(of_rank[3])
        bad.merge(lost_in(shards))
        bad.check(shards.data.max_bad_fraction, at_least=1, key=key)
        kept = _different(contents, lines)
        if len(kept) < pair.FEWEST:
            raise ValueError(
                f"{key}: {len(kept)} pairs, without {len(lines) - len(kept)} whose image or caption came before and {bad.total} that "
                f"cannot be read; neighbours and ranks need {pair.FEWEST}: give more pairs"
            )
        seen = {role: self._whole(own, role, key, kept) for role in ("student", *self.teachers)}

        def numbers() -> dict[str, dict[str, float]]:
            on_device = {
                role: one._replace(image=one.image.to(device), text=one.text.to(device), scale=one.scale.to(device))
                for role, one in seen.items()
            }
            return {
                role: pair.numbers(on_device["student"], on_device[role], _summed([of[role] for of in patches if role in of]))
                for role in self.teachers
            }

        device = self.world.device
        found = collectives.by_main(numbers, self.world)
        several: dict[str, Any] = dict(found)
        return {
            "pairs": len(kept), "repeated": len(lines) - len(kept), "unreadable": bad.total,
            **(several if len(found) > 1 else next(iter(found.values()))),
        }  # fmt: skip

    def _see(self, shards: ShardSet) -> _Seen:
        """Show this rank's share to all models. Every rank asks the teachers equally often, whatever it can read."""
        size, most, own = self.encoder.batch, -(-len(shards) // self.world.size), _Seen()
        views = {"student": TowerView(self.encoder.preprocess, self.encoder.tokenize)}
        views |= {role: TowerView(preprocessing(shown.description), shown.description.tokenize) for role, shown in self.teachers.items()}
        streams = {
            view.evaluation_pixels: evaluation_batches(
                shards, view, rank=self.world.rank, world=self.world.size, batch=size, fields=("pixels", "captions", "content"),
                workers=self.workers, pin_memory=False,
            )
            for view in views.values()
        }  # fmt: skip
        steady = _Steady(zip(*streams.values(), strict=True), -(-most // size))
        between = self.interruptions.between(iter(steady), len(shards), size)
        for number, batches in enumerate(with_progress(between, "evaluating diagnostics", "batches", -(-most // size))):
            by_view = dict(zip(streams, batches, strict=True)) if batches else {}
            pixels = {role: None if not by_view else by_view[view.evaluation_pixels].pixels for role, view in views.items()}
            first = batches[0] if batches else None
            lines = [] if first is None else [next(line for line in text.splitlines() if line.strip()) for text in first.captions or []]
            if first is not None:
                own.bad.merge(first.bad)
                own.lines += lines
                own.contents += [(high, low) for high, low in ([] if first.content is None else first.content.tolist())]
            maps = self._show_student(own, pixels["student"], lines) if lines else {}
            for role, shown in self.teachers.items():
                calls = -(-min(size, most - number * size) // shown.piece)
                seen_by = pixels[role]
                if seen_by is None:
                    seen_by = torch.zeros(0, 3, *views[role].train_pixels[:2], dtype=torch.uint8)
                found = shown.see(seen_by, lines, self.world.device, calls)
                own.add(role, found.image, found.text)
                own.scale[role] = found.scale.float().cpu()
                if shown.grid is not None and lines:
                    both = (on_grid(one, shown.grid).flatten(0, 2) for one in (maps[BLOCK], found.features[f"patches.{BLOCK}"]))
                    moments = Moments.of(*both)
                    if role in own.patches:
                        own.patches[role].add(moments)
                    else:
                        own.patches[role] = moments
        errors = [error for error in collectives.everyones(steady.failure, self.world) if error is not None]
        if errors:
            raise errors[0]
        return own

    def _show_student(self, own: _Seen, pixels: Tensor | None, lines: list[str]) -> dict[int | Weights, Tensor]:
        """Its patch tokens (n, h, w, C) by block, where a teacher has some on a common grid."""
        assert pixels is not None
        visual: Any = getattr(self.encoder.clip, "visual", None)
        blocks = [BLOCK] if any(shown.grid is not None for shown in self.teachers.values()) else []
        with torch.no_grad(), TowerReader(visual, blocks) as reader:
            image_nD = self.encoder.encode_pixels(pixels)
            own.add("student", image_nD, self.encoder.encode_texts(lines))
            return reader.maps(image_nD)

    def _whole(self, own: _Seen, role: str, key: str, kept: list[int]) -> Embeddings:
        """The different pairs of all ranks, as one model sees them. A collective."""
        sides = []
        for side, parts, has in (("image", own.image, True), ("text", own.text, role == "student" or self.teachers[role].has_text)):
            width = self.encoder.width if role == "student" else self.teachers[role].teacher.width
            local = torch.cat(parts[role]) if role in parts else torch.zeros(0, width if has else 0)
            sides.append(finite(collectives.gather_rows(local, self.world), f"{key}: {role}'s {side}")[kept])
        scale = torch.tensor(self.encoder.scale) if role == "student" else own.scale[role]
        return Embeddings(sides[0], sides[1], scale)


class _Steady:
    """Rounds of batches, as many on every rank; empty where this one has none. What a batch fails by waits in `failure` for the end."""

    def __init__(self, batches: Iterator[tuple[EvaluationBatch, ...]], rounds: int) -> None:
        self._batches, self._rounds = batches, rounds
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[tuple[EvaluationBatch, ...]]:
        for _ in itertools.repeat(None, self._rounds):
            try:
                yield () if self.failure is not None else next(self._batches, ())
            except (ValueError, OSError) as error:
                self.failure = error
                yield ()


def _different(contents: list[tuple[int, int]], lines: list[str]) -> list[int]:
    """The numbers of the pairs of which neither the image nor the caption came before in one that is kept."""
    images, captions, kept = set[tuple[int, int]](), set[str](), list[int]()
    for number, (content, line) in enumerate(zip(contents, lines, strict=True)):
        if content not in images and line not in captions:
            images.add(content)
            captions.add(line)
            kept.append(number)
    return kept


def _summed(parts: list[Moments]) -> Moments | None:
    total: Moments | None = None
    for part in parts:
        if total is None:
            total = part
        else:
            total.add(part)
    return total
