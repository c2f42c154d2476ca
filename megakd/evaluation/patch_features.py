"""Patch tokens of many images, computed once by all ranks and kept in float16 on the first.

An image's tokens do not depend on the number of ranks: the ranks take whole batches in turn, and the batches are the same for any number.

Legend: N images, n of a batch, V patches of the tower, P tokens that an image becomes, C the block's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megakd.data.bad_samples import BadCounter, BadSample, located, usable
from megakd.data.stream import WorkerStream, reported
from megakd.data.transforms import evaluation_pixels, input_size, normalise, rgb_image
from megakd.evaluation.encoder import Encoder
from megakd.models.heads import normalised
from megakd.models.patches import Patches, TowerReader, measure
from megakd.recipe import Data
from megakd.runtime import collectives, watchdog
from megakd.runtime.console import with_progress
from megakd.runtime.launch import World
from megakd.runtime.precision import of_towers
from megakd.runtime.preemption import StopPoller

MOST_BYTES = 8 * 2**30
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class TokenPlan:
    """How an image becomes tokens: of block `layer`, averaged over `side` x `side` cells; side 0: every patch. patches: of that block."""

    layer: int
    side: int
    patches: Patches

    @property
    def shape(self) -> tuple[int, int]:
        """(P, C)."""
        return self.side**2 or self.patches.count, self.patches.width

    def averaged(self, tokens_nVC: Tensor) -> Tensor:
        """(n, P, C), by the same averages as the decoder's projector takes."""
        if not self.side:
            return tokens_nVC
        if self.side == 1:
            return tokens_nVC.mean(dim=1, keepdim=True)
        assert self.patches.grid is not None
        grid_nChw = tokens_nVC.transpose(1, 2).unflatten(2, self.patches.grid)
        return F.adaptive_avg_pool2d(grid_nChw, self.side).flatten(2).transpose(1, 2)


def plan_tokens(visual: nn.Module, layer: int, image_tokens: int, images: int, key: str) -> TokenPlan:
    """For `images` images of this tower, which may be on torch's meta device.

    Raises ValueError, naming keys of the recipe's section `key`, for a tower without blocks that are known, for tokens that it does not
    have, and for more than MOST_BYTES.
    """
    patches = measure(visual, layer, f"{key}.layer")
    side = math.isqrt(image_tokens)
    if side > 1 and (patches.grid is None or side > min(patches.grid)):
        there = (
            f"{patches.count} patches form no grid to average over"
            if patches.grid is None
            else f"grid has {patches.grid[0]} x {patches.grid[1]} patches"
        )
        most = "" if patches.grid is None else f"to {min(patches.grid) ** 2} at most, or "
        raise ValueError(
            f"{key}.image_tokens = {image_tokens}: the vision tower's {there} at {key}.layer; set it {most}to 0 for every patch"
        )
    plan = TokenPlan(layer, side, patches)
    size = 2 * images * math.prod(plan.shape)
    if size > MOST_BYTES:
        fitting = math.isqrt(MOST_BYTES // (2 * images * patches.width))
        remedy = f"set {key}.image_tokens to {fitting**2} at most, or take fewer images" if fitting else "take fewer images"
        raise ValueError(
            f"{key}: {plan.shape[0]} tokens of {patches.width} numbers for each of {images} images take {size / 2**30:.1f} GiB in float16, "
            f"and at most {MOST_BYTES / 2**30:.0f} GiB are kept: {remedy}"
        )
    return plan


class Pictures(Protocol):
    """Images by number. `read` gives (where, the image's bytes) for each, in order; a BadSample for one that cannot be read."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Iterable[tuple[str, bytes] | BadSample]: ...


@dataclass(frozen=True)
class _Batch:
    """pixels: (n, 3, H, W) uint8, zeros for those of `unread`, which are (number, why)."""

    pixels: Tensor
    unread: list[tuple[int, BadSample]]
    bad: BadCounter

    def pin_memory(self) -> _Batch:
        return _Batch(self.pixels.pin_memory(), self.unread, self.bad)


@dataclass
class _Loader:
    pictures: Pictures
    preprocess: Any
    data: Data

    def __getitems__(self, indices: list[int]) -> _Batch:
        made = usable(indices, self.pictures.read(indices), lambda _, item: self._pixels(*item))
        pixels = np.zeros((len(indices), 3, *input_size(self.preprocess)), np.uint8)
        rows = dict(zip(made.index_of_row, made.rows, strict=True))
        for place, index in enumerate(indices):
            if index in rows:
                pixels[place] = rows[index]
        return _Batch(torch.from_numpy(pixels), made.unusable, made.bad)

    def _pixels(self, where: str, image: bytes) -> Any:
        with located(where):
            return evaluation_pixels(rgb_image(image, self.data), self.preprocess)


@dataclass(frozen=True)
class Features:
    """tokens_NPC: float16. pooled_ND: unit rows in float32, of what the tower makes of an image. Both on the CPU, zeros for unread images,
    without a row on other ranks than the first. unread: by number, why, on every rank.
    """

    tokens_NPC: Tensor
    pooled_ND: Tensor
    unread: dict[int, BadSample]


def features(
    pictures: Pictures, plan: TokenPlan, encoder: Encoder, world: World, data: Data, interruptions: StopPoller, key: str
) -> Features:
    """Of all pictures. A collective. Raises ValueError, on every rank, for numbers that are not finite; Interrupted when a signal comes."""
    count, size = len(pictures), encoder.batch
    batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    mine = batches[world.rank :: world.size]
    loader, own = _Loader(pictures, encoder.preprocess, data), list[tuple[Tensor, Tensor]]()
    unread, broken = dict[int, BadSample](), 0
    stream: Iterator[_Batch] = reported(WorkerStream(loader, mine, min(data.workers, len(mine)), world.device.type == "cuda"))
    between = interruptions.between(stream, len(batches), 1)
    for batch in with_progress(between, f"evaluating {key} (its images)", "batches", len(mine)):
        tokens_nPC, pooled_nD = _seen(batch.pixels, plan, encoder)
        broken += int((~(tokens_nPC.isfinite().flatten(1).all(dim=1) & pooled_nD.isfinite().all(dim=1))).sum())
        unread |= dict(batch.unread)
        read_n = torch.tensor([index not in unread for index in mine[len(own)]]).view(-1, 1)
        # channels beyond float16's range, which large towers have a few of, stay as far out as it goes
        own.append((tokens_nPC.clamp(-_LARGEST, _LARGEST).half() * read_n.unsqueeze(2), pooled_nD * read_n))
    known = collectives.everyones((unread, broken, own[0][1].shape[1] if own else 0), world)
    if wrong := sum(of_rank[1] for of_rank in known):
        raise ValueError(
            f"{key}: what the tower makes of {wrong} of {count} images is not finite (NaN or infinite): no score means anything. "
            f"The weights are damaged or the training has diverged: take an earlier checkpoint, or lower optim.lr"
        )
    tokens_NPC = _on_main([tokens for tokens, _ in own], (count, size, *plan.shape), torch.float16, world)
    width = max(of_rank[2] for of_rank in known)
    pooled_ND = _on_main([pooled for _, pooled in own], (count, size, width), torch.float32, world)
    return Features(tokens_NPC, pooled_ND, {index: why for of_rank in known for index, why in of_rank[0].items()})


def _seen(pixels: Tensor, plan: TokenPlan, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """(n, P, C) and (n, D), float32 on the CPU, of one forward."""
    watchdog.beat("evaluating")
    ready, model = normalise(pixels.to(encoder.device, non_blocking=True), encoder.preprocess, encoder.dtype), encoder.clip
    with torch.no_grad(), of_towers(encoder.device), TowerReader(model.visual, [plan.layer]) as reader:
        embedded_nD = model.encode_image(ready)  # type: ignore[operator]
        tokens_nVC = reader.tokens(embedded_nD)[plan.layer].float()
    return plan.averaged(tokens_nVC).cpu(), normalised(embedded_nD).float().cpu()


def _on_main(own: list[Tensor], shape: tuple[int, ...], kind: torch.dtype, world: World) -> Tensor:
    """The first rank's batches and the others', in the images' order, on the first; no row elsewhere. shape: (N, size of a batch, ...)."""
    count, size, *row = shape
    if world.size == 1:
        return torch.cat(own) if own else torch.zeros((0, *row), dtype=kind)
    together = torch.zeros((count if world.is_main else 0, *row), dtype=kind)
    for start in range(0, count, size * world.size):
        number = start // (size * world.size)
        piece = torch.zeros((size, *row), dtype=kind)
        if number < len(own):
            piece[: len(own[number])] = own[number]
        pieces = [torch.empty_like(piece) for _ in range(world.size)] if world.is_main else None
        dist.gather(piece, pieces)
        if pieces is not None:
            rows = torch.cat(pieces)[: count - start]
            together[start : start + len(rows)] = rows
    return together
