"""What both sides read: shards of photograph-like pictures and a teacher's weights, made once and kept."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from megakd.data.shapes.shards import sample_key, write_atomically, write_tar
from megakd.runtime.files import atomic_file

SHARDS, SAMPLES_A_SHARD = 16, 256
SHORT_SIDE, LONG_SIDES = 256, (256, 288, 320, 341, 384)  # as img2dataset leaves web pictures at image_size=256, keep_ratio
QUALITY = 92
_OCTAVES = (4, 8, 16, 32, 64, 128, 256)
# Common and rare words, so that the tokenizer splits some of them.
_TEXT = (
    "a the of on in with and photo picture view old small large red blue green wooden street market harbour mountain river bridge "
    "dog cat horse children woman man sitting standing walking vintage handmade leather ceramic stainless waterproof 2019 sunset "
    "kitchen architecture illustration photography embroidered archipelago chrysanthemum Neuschwanstein 1920x1080 DIY"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Shards:
    """folder: the tars; first: how many of them are read; None: all; pattern: the same for this program; braces: for webdataset."""

    folder: Path
    samples: int
    first: int | None = None

    @property
    def pattern(self) -> str:
        return str(self.folder / "*.tar") if self.first is None else self.braces

    @property
    def braces(self) -> str:
        return str(self.folder / f"{{00000..{(self.first or SHARDS) - 1:05d}}}.tar")


def shards(cache: Path, first: int | None = None) -> Shards:
    """4096 pairs in 16 tars, about 170 MB, written on the first call with all cores (a minute on two). first: only so many of them."""
    folder = cache / "bench-shards-1"
    missing = [number for number in range(first or SHARDS) if not (folder / f"{number:05d}.tar").exists()]
    if missing:
        print(f"writing {len(missing) * SAMPLES_A_SHARD} pairs to {folder}, once", flush=True)
        with multiprocessing.get_context("spawn").Pool(min(len(missing), os.cpu_count() or 1)) as pool:
            pool.map(partial(_write, folder), missing)
    return Shards(folder, (first or SHARDS) * SAMPLES_A_SHARD, first)


def shards_of(pairs: int) -> int:
    """The fewest whole shards that hold so many pairs; all where there are not so many."""
    return min(SHARDS, -(-pairs // SAMPLES_A_SHARD))


def check_workers(workers: int) -> None:
    if not 1 <= workers <= SHARDS:
        raise ValueError(f"--workers {workers}: open_clip's loader needs a shard for each worker; give 1 to {SHARDS}")


def _write(folder: Path, number: int) -> None:
    rng = np.random.default_rng((1, number))
    count = write_tar(
        folder / f"{number:05d}.tar",
        ((sample_key(number, index), {"jpg": photograph(rng), "txt": caption(rng)}) for index in range(SAMPLES_A_SHARD)),
    )
    stats = {"count": count, "successes": count}
    write_atomically(folder / f"{number:05d}_stats.json", json.dumps(stats).encode())


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG whose spectrum falls like a photograph's, with sharp edges in it: about 20 kB, so that decoding costs what it does in life."""
    width, height = SHORT_SIDE, int(rng.choice(LONG_SIDES))
    if rng.random() < 0.6:
        width, height = height, width
    picture = np.full((height, width, 3), rng.uniform(60, 190, 3), np.float32)
    for octave in _OCTAVES:
        picture += noise(rng, octave, width, height) * (130 / octave**0.4)
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 7))):
        x, y, w, h = (int(value) for value in rng.integers(0, SHORT_SIDE, 4))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((x, y, x + w // 3 + 4, y + h // 3 + 4), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def noise(rng: np.random.Generator, cells: int, width: int, height: int) -> NDArray[np.float32]:
    """Smooth noise of `cells` cells a side in [-.5, .5], (height, width, 3); half of it common to the channels."""
    grid = (rng.random((cells, cells, 1)) + rng.random((cells, cells, 3))) * 127.5
    smooth = Image.fromarray(grid.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32) / np.float32(255) - np.float32(0.5)


def caption(rng: np.random.Generator) -> bytes:
    return " ".join(rng.choice(_WORDS, int(rng.integers(6, 24)))).encode()


def teacher_weights(cache: Path, model: str) -> Path:
    """A state dict for an open_clip model, in a file that both sides load. About 600 MB for ViT-B-32.

    Random weights, but for the projection of texts, by which each picture of the first shard and its caption find each other, as a trained
    model's do: in the similarities of random weights no pair stands out, and rounding alone decides which is the largest.
    """
    path = cache / f"bench-{model}-fitted.pt"
    if not path.exists():
        import open_clip

        print(f"writing weights of {model} to {path}, once", flush=True)
        torch.manual_seed(0)
        clip, _, preprocess = open_clip.create_model_and_transforms(model)
        with tarfile.open(shards(cache, 1).folder / "00000.tar") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        images = torch.stack([preprocess(Image.open(io.BytesIO(files[name]))) for name in files if name.endswith(".jpg")])
        texts = open_clip.get_tokenizer(model)([files[name].decode() for name in files if name.endswith(".txt")])
        with torch.inference_mode():
            clip.eval().text_projection.copy_(torch.eye(*clip.text_projection.shape))
            parts = zip(images.split(32), texts.split(32), strict=True)
            embedded = [(clip.encode_image(image), clip.encode_text(text)) for image, text in parts]
            clip.text_projection.copy_(fitted_projection(*map(torch.cat, zip(*embedded, strict=True))))
        with atomic_file(path) as unfinished:
            torch.save(clip.state_dict(), unfinished)
    return path


def fitted_projection(image_ND: Tensor, feature_NW: Tensor) -> Tensor:
    """(W, D): the ridge regression of whitened images, less what all images share, on what the features of their texts do not share.

    The ridge is as large as the features' spread: without it the projection would read directions that are all rounding.
    """

    def with_ridge(centred_NX: Tensor, ridge: float) -> Tensor:
        products_NN = centred_NX @ centred_NX.T
        return products_NN + ridge * products_NN.diagonal().mean() * torch.eye(len(products_NN), dtype=products_NN.dtype)

    unit_ND, wide_NW = torch.nn.functional.normalize(image_ND.double(), dim=1), feature_NW.double()
    mean_D = unit_ND.mean(0)
    centred_ND, centred_NW = unit_ND - mean_D, wide_NW - wide_NW.mean(0)
    white_ND = torch.linalg.solve(with_ridge(centred_ND, 0.01), centred_ND)
    white_ND = torch.nn.functional.normalize(white_ND - torch.outer(white_ND @ mean_D, mean_D) / mean_D.square().sum(), dim=1)
    fitted_WD: Tensor = centred_NW.T @ torch.linalg.solve(with_ridge(centred_NW, 1.0), white_ND)
    return fitted_WD.to(feature_NW.dtype)
