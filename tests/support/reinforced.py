"""Shards in DataCompDR's layout, made as Apple's generator makes them: torchvision's own transforms, whose draws are written down.

Embeddings are of any function of pixels and texts; nothing here uses what reads them.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from support.shards import Member, jpeg, write_tar

# (pixels (V, 3, H, W) uint8, texts) -> the unit rows of both, of all teachers one after the other
Embed = Callable[[Tensor, list[str]], tuple[Tensor, Tensor]]
Form = Literal["npz", "pth.gz", "bf16", "by name"]
FORMS: tuple[Form, ...] = get_args(Form)
VIEWS, MAGNITUDE, BINS = 3, 9, 31
# What torchvision's RandAugment draws from, in its order: the strengths, of which it takes number 9 of 31, and whether there is a sign.
SPACE: list[tuple[Callable[[int], Tensor] | None, bool]] = [
    (None, False),
    *[(lambda size: torch.linspace(0, 0.3, BINS), True)] * 2,
    *[(lambda size: torch.linspace(0, 150 / 331 * size, BINS), True)] * 2,
    (lambda size: torch.linspace(0, 30, BINS), True),
    *[(lambda size: torch.linspace(0, 0.9, BINS), True)] * 4,
    (lambda size: 8 - (torch.arange(BINS) / ((BINS - 1) / 4)).round().int(), False),
    (lambda size: torch.linspace(255, 0, BINS), False),
    (None, False),
    (None, False),
]


def recorded(image: Image.Image, size: int, seed: int) -> tuple[list[Any], Image.Image]:
    """(what .paug.json has of a view, the picture that the generator embeds)"""
    torch.manual_seed(seed)
    crop = transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
    picture = functional.resized_crop(image, *crop, [size, size], transforms.InterpolationMode.BICUBIC)
    drawn = torch.get_rng_state()
    augmented = transforms.RandAugment(2, MAGNITUDE, BINS)(picture)
    torch.set_rng_state(drawn)
    operations = []
    for _ in range(2):
        number = int(torch.randint(len(SPACE), (1,)))
        strengths, signed = SPACE[number]
        strength = 0.0 if strengths is None else float(strengths(size)[MAGNITUDE])
        operations.append([number, -strength if signed and torch.randint(2, (1,)) else strength])
    return [list(crop), operations], augmented


@dataclass(frozen=True)
class Written:
    """A set on disk: pattern names its shards; of each sample the V pictures (V, 3, H, W), the texts, and the rows of both."""

    pattern: str
    pictures: list[Tensor] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


def synthetic(caption: str) -> list[str]:
    return [f"a picture of {caption}", " ".join(reversed(caption.split()))]


def write_reinforced(
    folder: Path,
    pairs: Sequence[tuple[bytes, str]],
    embed: Embed,
    size: int,
    *,
    form: Form = "npz",
    change: Callable[[int, dict[str, bytes]], Mapping[str, bytes]] = lambda _, members: members,
) -> Written:
    """One shard of these pairs. size: of the pictures that are embedded. change: a sample's members before they are written."""
    written = Written(str(folder / "00000.tar"))
    members: list[Member] = []
    for number, (picture, caption) in enumerate(pairs):
        own = sample_members(picture, caption, embed, size, form=form, number=number, keep=written)
        members += [(f"{number:06d}.{name}", data) for name, data in change(number, own).items()]
    write_tar(Path(written.pattern), members)
    return written


def sample_members(
    picture: bytes, caption: str, embed: Embed, size: int, *, form: Form = "npz", number: int = 0, keep: Written | None = None
) -> dict[str, bytes]:
    """Of one sample, by extension; every second one has its augmentations as a string. keep: where its pictures and rows are noted."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    views = [recorded(image, size, 1000 * number + view) for view in range(VIEWS)]
    pixels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for _, one in views])
    texts = [caption, *synthetic(caption)]
    image_VW, text_TW = embed(pixels, texts)
    if keep is not None:
        keep.pictures.append(pixels)
        keep.texts.append(texts)
        keep.images.append(image_VW)
        keep.rows.append(text_TW)
    listed: Any = [augmentation for augmentation, _ in views]
    return {
        "jpg": picture,
        "txt": caption.encode(),
        "json": json.dumps({"uid": f"{number}"}).encode(),
        "url.txt": f"http://example.org/{number}".encode(),
        "paug.json": json.dumps({"param_aug": json.dumps(listed) if number % 2 else listed}).encode(),
        "syn.json": json.dumps({"syn_text": texts[1:]}).encode(),
        **packed(image_VW, text_TW, form),
    }


def packed(image_VW: Tensor, text_TW: Tensor, form: Form = "npz") -> dict[str, bytes]:
    """The member that holds the embeddings."""
    arrays = {"image_emb": image_VW, "text_emb": text_TW}
    if form == "by name":  # as newer sets have them
        arrays = {"image_emb": image_VW, "text_emb": text_TW[:1], "syn_text_emb": text_TW[1:]}
    if form in ("npz", "by name"):
        return {"npz": npz(**{name: rows.numpy() for name, rows in arrays.items()})}
    return {"pth.gz": gzipped({name: rows.bfloat16() if form == "bf16" else rows for name, rows in arrays.items()})}


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npz_of(**contents: bytes) -> bytes:
    """An .npz of any bytes, packed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def gzipped(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return gzip.compress(file.getvalue(), 1)


def plain_pairs(count: int, size: tuple[int, int] = (60, 50)) -> list[tuple[bytes, str]]:
    return [(jpeg(number, size), f"caption number {number}") for number in range(count)]


def numbered(pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Rows of two teachers, of widths 4 and 3, that tell pictures and texts apart."""

    def rows(values: list[float], width: int) -> Tensor:
        return torch.nn.functional.normalize(torch.stack([torch.arange(1, width + 1) + 7 * torch.tensor(value).sin() for value in values]))

    seen = [float(one.float().mean()) for one in pixels]
    said = [float(sum(map(ord, text))) for text in texts]
    return torch.cat([rows(seen, 4), rows(seen, 3)], 1), torch.cat([rows(said, 4), rows(said, 3)], 1)
