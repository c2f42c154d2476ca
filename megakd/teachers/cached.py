"""A teacher whose embeddings were computed before: rows of a store, and the live model for what the store does not have.

Legend: B local batch, D embedding width, M misses of this rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from megakd.models.embeddings import Embeddings
from megakd.runtime import collectives
from megakd.runtime.gathered import Gathered
from megakd.runtime.launch import World
from megakd.teachers.base import LiveTeacher

StoreMiss = Literal["teacher", "fail"]
# (samples (M,), view numbers (M,), type of the pixels) -> what `Teacher.embed` takes, on the device; one row of anything for M = 0
Reread = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]

_REPAIR = "`megakd embed --check` names the parts; remove those, and `megakd embed` writes them anew"

log = logging.getLogger("megakd.teachers")


class TextStoredTeacher:
    """The image tower alone, live; texts are rows of a store."""

    def __init__(
        self,
        live: LiveTeacher,
        scale: float,
        bias: float | None,
        world: World,
        where: Callable[[int], str],
        columns: slice = slice(None),
    ) -> None:
        """where: 'shard: key' of a sample, for messages. columns: which numbers of a row are this teacher's."""
        self.width, self.dtype, self.see, self.gathered, self._columns = live.width, live.dtype, live.see, live.gathered, columns
        self._scale, self._bias = _scalars(scale, bias, world)
        self._world, self._where = world, where

    def join(
        self,
        seen: Sequence[tuple[Tensor, dict[str, Tensor]]],
        text_BD: Tensor,
        known_B: Tensor,
        index_B: Tensor,
        damaged_B: Tensor | None = None,
    ) -> Embeddings:
        """What `see` found of each micro-batch, with a store's rows of text, valid where known_B, of the samples index_B, on the CPU.

        Every rank calls it. Raises ValueError on every rank when a row is missing.
        """
        missing_M = index_B[~known_B]
        if total := sum(_misses(len(missing_M), self._world)):
            raise _missing(total, _damaged(damaged_B, self._world), missing_M, self._where)
        text_BD = text_BD[:, self._columns]
        text = text_BD.to(seen[0][0].device, seen[0][0].dtype, non_blocking=True).split([len(image_BD) for image_BD, _ in seen])
        parts = [Embeddings(image, own, self._scale, self._bias, features=more) for (image, more), own in zip(seen, text, strict=True)]
        return Embeddings.joined(parts)


class StoredTeacher:
    """Embeddings of a batch from the rows that a store has of it.

    A step on which any rank misses a row concerns all of them: either every rank raises, or every rank builds the live teacher (once)
    and calls it equally often, since a sharded teacher communicates in `embed`.
    """

    def __init__(
        self,
        *,
        width: int,
        scale: float,
        bias: float | None,
        dtype: torch.dtype,
        world: World,
        miss: StoreMiss,
        build: Callable[[], LiveTeacher],
        reread: Reread,
        where: Callable[[int], str],
        piece: int,
        columns: slice = slice(None),
    ) -> None:
        """dtype: of the embeddings, as the live teacher gives them. piece: images in one forward of the live teacher.

        where: 'shard: key' of a sample, for messages. columns: which numbers of a stored row are this teacher's.
        """
        self._columns = columns
        self.width, self.dtype, self.misses, self.damaged = width, dtype, 0, 0
        self._scale, self._bias = _scalars(scale, bias, world)
        self._world, self._miss, self._build, self._reread, self._where, self._piece = world, miss, build, reread, where, piece
        self._live: LiveTeacher | None = None

    def recall(
        self,
        image_BD: Tensor,
        text_BD: Tensor,
        known_B: Tensor,
        index_B: Tensor,
        view_B: Tensor,
        damaged_B: Tensor | None = None,
        patches: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> Embeddings:
        """Unit embeddings of a batch, without gradient; every rank calls it for its part of the batch. All arguments are on the CPU.

        image_BD, text_BD: a store's rows, valid where known_B (bool); index_B, view_B: which sample and view each row is.
        damaged_B: (bool) which of the unknown ones are in the store, but not as they were written; for what is said about them.
        patches: patch tokens (B, h, w, C) by the blocks that are asked for, on the grid on which the live teacher gives them.
        Raises ValueError on every rank when a row is missing and misses are to fail.
        """
        missing_M = (~known_B).nonzero().flatten()
        counts = _misses(len(missing_M), self._world)
        image_BD, text_BD = image_BD[:, self._columns], text_BD[:, self._columns]
        stored = {"image": image_BD, "text": text_BD, **{f"patches.{block}": map_BhwC for block, map_BhwC in patches.items()}}
        found = {name: rows.to(self._world.device, self.dtype, non_blocking=True) for name, rows in stored.items()}
        if any(counts):
            self._refuse_or_say(counts, _damaged(damaged_B, self._world), index_B[missing_M])
            live = self._teach(index_B[missing_M], view_B[missing_M], max(counts), tuple(patches))
            where = missing_M.to(self._world.device)
            for name, rows in {"image": live.image, "text": live.text, **live.features}.items():
                found[name][where] = rows.to(self.dtype)
        return Embeddings(found.pop("image"), found.pop("text"), self._scale, self._bias, features=found)

    def _refuse_or_say(self, counts: list[int], damaged: int, index_M: Tensor) -> None:
        total = sum(counts)
        if self._miss == "fail":
            raise _missing(total, damaged, index_M, self._where)
        example = _example(index_M, self._where)
        if self.misses == 0:
            log.warning("%d samples of this batch are not in the store (%s): the teacher is loaded to embed such samples", total, example)
        if self.damaged == 0 and damaged:
            log.warning("%d of them are in the store, but not as they were written: %s", damaged, _REPAIR)
        self.misses += total
        self.damaged += damaged

    def gathered(self) -> Gathered | None:
        """As `LiveTeacher.gathered`, once it was asked."""
        return None if self._live is None else self._live.gathered()

    def live(self) -> LiveTeacher:
        """The model itself, loaded at the first call. A collective."""
        if self._live is None:
            self._live = self._build()
        return self._live

    def _teach(self, index_M: Tensor, view_M: Tensor, most: int, blocks: tuple[int, ...]) -> Embeddings:
        """The live teacher's embeddings of M samples. Every rank makes as many calls as the one with `most` samples needs."""
        live, parts = self.live(), []
        for start in range(0, most, self._piece):
            asked = slice(start, start + self._piece)
            count = len(index_M[asked])
            found = live.embed(*self._reread(index_M[asked], view_M[asked], live.dtype), blocks)
            features = {name: rows[:count] for name, rows in found.features.items()}
            parts.append(found._replace(image=found.image[:count], text=found.text[:count], features=features))
        return Embeddings.joined(parts)


def _scalars(scale: float, bias: float | None, world: World) -> tuple[Tensor, Tensor | None]:
    def on_device(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=world.device)

    return on_device(scale), None if bias is None else on_device(bias)


def _misses(mine: int, world: World) -> list[int]:
    """Of every rank: on the CPU, so that no device is waited for."""
    counts = torch.zeros(world.size)
    counts[world.rank] = mine
    return [int(count) for count in collectives.start_sum(counts, world).read()]


def _damaged(damaged_B: Tensor | None, world: World) -> int:
    """Of all ranks, asked where there are misses."""
    return sum(_misses(0 if damaged_B is None else int(damaged_B.sum()), world))


def _example(index_M: Tensor, where: Callable[[int], str]) -> str:
    return where(int(index_M[0])) if len(index_M) else "on another rank"


def _missing(total: int, damaged: int, index_M: Tensor, where: Callable[[int], str]) -> ValueError:
    not_as_written = f" {damaged} of them are, but not as they were written: {_REPAIR}." if damaged else ""
    return ValueError(
        f"teacher.store: {total} samples of this batch are not in the store, and teacher.store_miss is 'fail'.{not_as_written} "
        f"Example: {_example(index_M, where)}. Complete the store with `megakd embed`, or set teacher.store_miss = 'teacher'"
    )
