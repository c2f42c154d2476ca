"""What a written model is tried on before an export says that it is done: pictures as a model meets them, texts, and how rows are compared.

Random pixels would hide faults: a photograph's neighbouring pixels are alike, which gives activations of another size.
Legend: N pictures, n texts, H x W a tower's size, L its context, D width of an embedding.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from megakd.data.shapes.captions import captions
from megakd.data.shapes.pixels import draw_picture
from megakd.data.shapes.scene import scene_of
from megakd.data.transforms import evaluation_pixels, normalise
from megakd.models.clip import ClipModel, ModelSpec
from megakd.models.tokenizing import SAMPLES

# Largest difference of one number of two unit embeddings in float32, which sums in another order explain.
CLOSE = 1e-5
_SHAPES = 3
_PHOTOGRAPHS = ((320, 240), (200, 260), (97, 97))  # width and height


def pictures() -> list[Image.Image]:
    """The shapes world's, then smooth ones of a photograph's spectrum; of several sizes and aspects, always the same."""
    found = [
        Image.fromarray(draw_picture(scene_of(0, "test", index), random.Random(index), 96 + 40 * index)).convert("RGB")
        for index in range(_SHAPES)
    ]
    return found + [_photograph(number, size) for number, size in enumerate(_PHOTOGRAPHS)]


def _photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """Random fields from coarse to fine, each half as strong as the one before: power falls with the square of the frequency."""
    draws = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3), np.float32)
    for octave in range(7):
        cells = 2 + 2**octave
        coarse = draws.normal(size=(cells, cells, 3)).astype(np.float32) * 2.0**-octave
        planes = [Image.fromarray(coarse[..., colour]).resize(size, Image.Resampling.BICUBIC) for colour in range(3)]
        total += np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return Image.fromarray(np.clip(128 + 48 * total, 0, 255).astype(np.uint8))


def pixels(built: ClipModel) -> Tensor:
    """(N, 3, H, W) float32: `pictures` by the model's own preprocessing."""
    rows = [torch.from_numpy(evaluation_pixels(picture, built.preprocess).copy()) for picture in pictures()]
    return normalise(torch.stack(rows), built.preprocess, torch.float32)


def texts() -> list[str]:
    """Captions of the pictures, then what tokenizers differ in."""
    own = [next(iter(captions(scene_of(0, "test", index), random.Random(index)).values())).text for index in range(_SHAPES)]
    return [*own, *SAMPLES]


def tokens(description: ModelSpec) -> Tensor:
    """(n, L) int64 of `texts`, by the model's own tokenizer."""
    return description.tokenize(texts())


def difference(one_ND: Tensor, other_ND: Tensor) -> float:
    """The largest difference of a number of two lots of embeddings, each brought to length 1; infinite where one is not finite."""
    gap = (F.normalize(one_ND.double(), dim=1) - F.normalize(other_ND.double(), dim=1)).abs().max()
    return float(gap) if bool(gap.isfinite()) else float("inf")


def cosines(one_ND: Tensor, other_ND: Tensor) -> Tensor:
    """(N,) float64."""
    return F.cosine_similarity(one_ND.double(), other_ND.double(), dim=1)
