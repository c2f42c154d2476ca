"""Evaluation sets of numbered pictures, and a model that reads the numbers: whatever it misses is the evaluation's doing.

A picture shows its number in sixteen black or white squares; a caption begins with it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor, nn

from megakd.evaluation.encoder import Encoder
from megakd.evaluation.sets import open_sets
from megakd.evaluation.suite import Suite
from megakd.recipe import Recipe
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller

SQUARES = 16


def bits(number: int) -> list[int]:
    return [number >> place & 1 for place in range(SQUARES)]


def picture(number: int, **options: Any) -> bytes:
    squares = np.array(bits(number), np.uint8).reshape(4, 4) * 255
    file = io.BytesIO()
    Image.fromarray(squares.repeat(4, 0).repeat(4, 1)).convert("RGB").save(file, "PNG", **options)
    return file.getvalue()


class Reader(nn.Module):
    """Reads numbers; blind: sees every picture as the same one; broken: of the picture with this number nothing comes but NaN."""

    def __init__(self, *, blind: bool = False, broken: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.blind, self.broken = blind, broken

    def encode_image(self, pixels: Tensor) -> Tensor:
        seen = pixels.mean(dim=1)[:, 2::4, 2::4].flatten(1).sign()
        seen = torch.ones_like(seen) if self.blind else seen
        if self.broken is not None:
            is_broken = (seen == torch.tensor(bits(self.broken)) * 2.0 - 1).all(dim=1)
            seen = torch.where(is_broken.unsqueeze(1), torch.nan, seen)
        return seen * self.weight

    def encode_text(self, tokens: Tensor) -> Tensor:
        return (tokens.float() * 2 - 1) * self.weight


def tokenize(texts: list[str]) -> Tensor:
    """The bits of the number that a text begins with; of none, those of 43690."""
    first = [text.split()[0] if text.split() else "" for text in texts]
    return torch.tensor([bits(int(word) if word.isdigit() else 43690) for word in first]).reshape(-1, SQUARES)


def encoder(model: nn.Module | None = None, batch: int = 7) -> Encoder:
    preprocess = PreprocessCfg(size=16, resize_mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    return Encoder((model or Reader()).eval(), preprocess, tokenize, torch.device("cpu"), batch)


def recipe(max_bad_fraction: float = 0.01, **evaluation: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "numbers",
            "data": {"train": "unused.tar", "max_bad_fraction": max_bad_fraction},
            "student": {"model": "ViT-B-32"},
            "objectives": {"contrastive": 1.0},
            "optim": {"steps": 2, "batch": 2, "lr": 1e-3},
            "evaluation": evaluation,
        }
    )


def results(wanted: Recipe, model: nn.Module | None = None, world: World | None = None) -> dict[str, Any]:
    """As a run scores it, without workers."""
    world = world or World(0, 1, torch.device("cpu"))
    return Suite(open_sets(wanted, world), encoder(model), world, 0, StopPoller(world)).run()


def scores(wanted: Recipe, model: nn.Module | None = None, world: World | None = None) -> dict[str, Any]:
    """`results` without what is measured by a clock."""
    return {kind: found for kind, found in results(wanted, model, world).items() if kind != "images_per_second"}


def captioned(number: int, captions: Sequence[str] | None = None) -> list[tuple[str, bytes]]:
    lines = [f"{number} as it is"] if captions is None else captions
    return [(f"{number:04d}.png", picture(number)), (f"{number:04d}.txt", "\n".join(lines).encode())]
