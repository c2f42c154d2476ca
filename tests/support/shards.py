"""Small shards for the tests of the loader: written member by member, so that every defect can be had."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megakd.data.shards import ShardSet
from megakd.recipe import Data

Member = tuple[str, bytes]


def no_barrier() -> None:
    """A single rank waits for nobody."""


def jpeg(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    generator = np.random.default_rng(number)
    small = Image.fromarray(generator.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def pair(key: str, number: int) -> list[Member]:
    return [(f"{key}.jpg", jpeg(number)), (f"{key}.txt", f"caption {number}".encode()), (f"{key}.json", b'{"number": %d}' % number)]


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_set(folder: Path, samples: int, shards: int) -> str:
    """A clean set; returns its pattern."""
    per = -(-samples // shards)
    for shard in range(shards):
        numbers = range(shard * per, min((shard + 1) * per, samples))
        write_tar(folder / f"{shard:05d}.tar", [member for number in numbers for member in pair(f"{number:06d}", number)])
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def data(train: str | list[str] | dict[str, Any], **more: object) -> Data:
    return Data.model_validate({"train": train, **more})


def open_shards(train: str | list[str] | dict[str, Any], **more: object) -> ShardSet:
    """A training set, by a single rank."""
    return ShardSet.open(data(train, **more), 0, 1, no_barrier)


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    """rows: each with its filter in front. colour: 0 for grey, 2 for RGB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def bomb_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any number of pixels."""
    return png(width, height, b"\0" * 64)


class ByteTokenizer:
    """Texts as bytes: (n, L) int64, padded with 0."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [list(text.encode()[: self.length].ljust(self.length, b"\0")) for text in texts]
        return torch.tensor(rows, dtype=torch.long)


def text_of(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).rstrip(b"\0").decode()
