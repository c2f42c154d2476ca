"""Shards for the loader's benchmark by the size of their pictures: of small ones as img2dataset leaves them, and of photographs.

Photographs are crops of the two that come with scikit-learn, 4 : 3 or 3 : 4, brought to the size with grain and a texture in which, as in
photographs, each octave has about the same energy: enlarged pictures lack the finest ones, and their files would be too small.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megakd.benchmarks.common import material
from megakd.benchmarks.common.material import SHARDS, Shards
from megakd.data.shapes.shards import sample_key, write_tar
from megakd.runtime.extras import library

SET = "set"  # `material.shards`: 256 px and more, synthetic
SIZES = (256, 512, 1024)  # a photograph's longer side
SAMPLES_A_SHARD = 32
QUALITIES = (85, 86, 87, 88, 89, 90)
_SMALLEST_PART = 0.7  # of the shipped photograph's largest crop
_GRAIN = 3.0  # levels, standard deviation, of single pixels
_TEXTURE = 14.0  # levels, of the range of each octave


def sources(given: str) -> list[str]:
    """The names in `--sources`. Raises ValueError for one that is unknown."""
    names = [name.strip() for name in given.split(",")]
    known = (SET, *map(str, SIZES))
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"--sources {wrong[0]}: choose among {','.join(known)}")
    return list(dict.fromkeys(names))


def shards(cache: Path, source: str) -> Shards:
    """Of a name in `sources`; 512 photographs in 16 tars, 9 to 120 MB, written on the first call with all cores.

    Raises ValueError where scikit-learn, which has the photographs, is not installed.
    """
    if source == SET:
        return material.shards(cache)
    folder = cache / f"bench-photographs-{source}-1"
    missing = [number for number in range(SHARDS) if not (folder / f"{number:05d}.tar").exists()]
    if missing:
        pictures = shipped()
        print(f"writing {len(missing) * SAMPLES_A_SHARD} photographs of {source} px to {folder}, once", flush=True)
        with multiprocessing.get_context("spawn").Pool(min(len(missing), os.cpu_count() or 1)) as pool:
            pool.map(partial(_write, folder, int(source), pictures), missing)
    return Shards(folder, SHARDS * SAMPLES_A_SHARD)


def short_side(source: str) -> int:
    """Pixels."""
    return material.SHORT_SIDE if source == SET else int(source) * 3 // 4


def shipped() -> list[NDArray[np.uint8]]:
    """scikit-learn's photographs, (427, 640, 3) each."""
    found = library("sklearn.datasets", f"photographs (--sources {SIZES[0]}) need", "study", "scikit-learn").load_sample_images()
    return list(found.images)


def photograph(rng: np.random.Generator, pictures: list[NDArray[np.uint8]], longer: int) -> bytes:
    """A JPEG of longer x longer * 3 / 4 pixels, or upright."""
    source = Image.fromarray(pictures[int(rng.integers(len(pictures)))])
    width, height = longer, longer * 3 // 4
    part = rng.uniform(_SMALLEST_PART, 1.0) * min(source.width / width, source.height / height)
    w, h = width * part, height * part
    left, top = rng.uniform(0, source.width - w), rng.uniform(0, source.height - h)
    image = source.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + w, top + h))
    if rng.random() < 0.4:
        image = image.transpose(Image.Transpose.ROTATE_90)
    picture = np.asarray(image, np.float32) + rng.normal(0, _GRAIN, (image.height, image.width, 1)).astype(np.float32)
    for octave in (2, 4, 8):
        picture += material.noise(rng, longer // octave, image.width, image.height) * _TEXTURE
    buffer = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=int(rng.choice(QUALITIES)))
    return buffer.getvalue()


def _write(folder: Path, longer: int, pictures: list[NDArray[np.uint8]], number: int) -> None:
    rng = np.random.default_rng((2, longer, number))
    write_tar(
        folder / f"{number:05d}.tar",
        (
            (sample_key(number, index), {"jpg": photograph(rng, pictures, longer), "txt": material.caption(rng)})
            for index in range(SAMPLES_A_SHARD)
        ),
    )
