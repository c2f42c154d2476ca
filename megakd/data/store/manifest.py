"""The manifest of a store of embeddings: what they depend on, their layout in parts, and the teacher's scale."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megakd.recipe.texts import flat
from megakd.runtime.files import json_sha256

FORMAT, WITH_PATCHES, WITH_CAPTIONS = 2, 3, 4  # of embeddings alone, with patch tokens, with several captions of a sample
MANIFEST = "manifest.json"
INTEGER_PRODUCTS = ("int_mm", "bitsandbytes")
StoreType = Literal["bf16", "fp32"]
_TORCH: dict[StoreType, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Far above any store's: by a damaged number parts would be listed for hours.
_MOST_PARTS, _LARGEST = 10**7, 1 << 24


class StoreError(ValueError):
    """A store that cannot be read or written; the message says which file, why, and what to do."""


def amount(number: int) -> str:
    """Bytes for people: "2,890 GB", "12.3 MB"."""
    size, unit = next(((number / size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB")) if number >= size), (number / 1e3, "kB"))
    return f"{size:,.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"


@dataclass(frozen=True)
class PatchLayout:
    """Patch tokens of each view of an image. grid: (h, w), of all blocks; widths: C by the block's number in the vision tower, from 0."""

    grid: tuple[int, int]
    widths: dict[int, int]

    @property
    def tensors(self) -> dict[str, tuple[int, int, int]]:
        """Names in a part, in the order of the blocks, with (h, w, C)."""
        return {f"patches.{block}": (*self.grid, self.widths[block]) for block in sorted(self.widths)}

    def __str__(self) -> str:
        blocks = ", ".join(f"{block} (width {self.widths[block]})" for block in sorted(self.widths))
        return f"patch tokens of block{'s' if len(self.widths) > 1 else ''} {blocks} on {self.grid[0]} x {self.grid[1]}"


@dataclass(frozen=True)
class Layout:
    """Part p holds the samples [p * part, (p + 1) * part), the last one fewer.

    captions: sources that each sample may have captions in, all of which are stored; None: it has one.
    """

    samples: int
    part: int
    views: int
    width: int
    dtype: StoreType
    patches: PatchLayout | None = None
    captions: int | None = None

    @property
    def parts(self) -> int:
        return -(-self.samples // self.part)

    def count(self, number: int) -> int:
        """Samples N of a part."""
        return min(self.part, self.samples - number * self.part)

    def shapes(self, number: int, texts: int = 0) -> dict[str, tuple[int, ...]]:
        """texts: captions of the part's samples together, where a sample may have several."""
        count = self.count(number)
        rows, several = (count, {}) if self.captions is None else (texts, {"captions": (count,)})
        patches = {name: (count, self.views, *shape) for name, shape in self.patch_tensors.items()}
        return {"image": (count, self.views, self.width), "text": (rows, self.width), "known": (count,), **several, **patches}

    @property
    def patch_tensors(self) -> dict[str, tuple[int, int, int]]:
        """As `PatchLayout.tensors`; empty without patch tokens."""
        return {} if self.patches is None else self.patches.tensors

    @property
    def checks(self) -> int:
        """Numbers of `reader.row_checks` for a sample."""
        return self.views * (1 + len(self.patch_tensors)) + 1

    @property
    def sample_bytes(self) -> int:
        """Of a sample's values in a part, and of their checks in its header; with a caption of each source."""
        texts = self.captions or 1
        numbers = self.width * texts + self.views * (self.width + sum(map(math.prod, self.patch_tensors.values())))
        checks = self.checks + (0 if self.captions is None else texts)
        return numbers * self.torch_dtype.itemsize + (1 if self.captions is None else 5) + math.ceil(checks * 16 / 3)

    def __str__(self) -> str:
        """For people: what is stored, and how much of a disk it takes."""
        patches = "" if self.patches is None else f" and {self.patches}"
        size = amount(self.samples * self.sample_bytes)
        several = "" if self.captions is None else f" with every caption (of {self.captions} sources, counted as one of each)"
        return f"{self.samples:,} samples, {self.views} views each, width {self.width}{patches}{several}, {self.dtype}: {size}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return _TORCH[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """Plain values; without `patches` and `captions` where there are none, as older versions wrote it."""
        plain = {name: value for name, value in vars(self).items() if name != "patches" and (name != "captions" or value is not None)}
        if self.patches is not None:
            widths = {str(block): width for block, width in sorted(self.patches.widths.items())}
            plain["patches"] = {"grid": list(self.patches.grid), "widths": widths}
        return plain

    @classmethod
    def of_json(cls, plain: dict[str, Any]) -> Layout:
        """Raises ValueError, KeyError or TypeError for what is none; numbers that cannot be are found in `_contradiction`."""
        if "patches" not in plain:
            return cls(**plain)
        (h, w), widths = plain["patches"]["grid"], plain["patches"]["widths"]
        return cls(**{**plain, "patches": PatchLayout((h, w), {int(block): width for block, width in widths.items()})})


@dataclass(frozen=True)
class Manifest:
    """key: what the embeddings depend on, nested; made: how they were computed. scale, bias: the teacher's, of `Embeddings`.

    parts: number -> facts of its header; empty until the store is complete.
    """

    key: dict[str, Any]
    made: dict[str, Any]
    layout: Layout
    scale: float
    bias: float | None
    parts: tuple[dict[str, Any], ...] = ()

    @property
    def digest(self) -> str:
        """In each part's header, by which parts of another store are known."""
        return hashlib.sha256(json.dumps([self.key, self.made, self.layout.to_json()], sort_keys=True).encode()).hexdigest()

    @property
    def seed(self) -> int:
        """Of the augmentations."""
        return int(self.key["seed"])

    def to_json(self) -> dict[str, Any]:
        version = FORMAT if self.layout.patches is None else WITH_PATCHES
        version = version if self.layout.captions is None else WITH_CAPTIONS
        content = {"format": version, **vars(self), "layout": self.layout.to_json(), "parts": list(self.parts)}
        return {**content, "sha256": json_sha256(content)}


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none. Raises StoreError for one that cannot be read or is of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    remedy = "make the store anew in another folder, or put its manifest back"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, checksum = content["format"], content.pop("sha256", None)
        if version not in (1, FORMAT, WITH_PATCHES, WITH_CAPTIONS):
            raise StoreError(f"{path}: format {version}, this version reads format 1 to {WITH_CAPTIONS}; make the store anew")
        if (version != 1 or checksum is not None) and checksum != json_sha256(content):
            raise StoreError(f"{path}: was changed after it was written; {remedy}")
        layout = Layout.of_json(content["layout"])
        manifest = Manifest(content["key"], content["made"], layout, content["scale"], content["bias"], tuple(content["parts"]))
        problem = _contradiction(manifest)
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: no manifest of a store ({error!r}); {remedy}") from error
    if problem:
        raise StoreError(f"{path}: cannot be true: {problem}; {remedy}")
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """What of a manifest cannot be true; of format 1 nothing else tells that it was changed."""
    layout, key = manifest.layout, manifest.key
    for name, value in (("samples", layout.samples), ("part", layout.part), ("views", layout.views), ("width", layout.width)):
        if type(value) is not int or value < 1:
            return f"layout.{name} = {value!r}"
    if layout.captions is not None and (type(layout.captions) is not int or not 1 <= layout.captions <= _LARGEST):
        return f"layout.captions = {layout.captions!r}"
    if layout.dtype not in _TORCH:
        return f"layout.dtype = {layout.dtype!r}"
    patches = layout.patch_tensors.values()
    if any(type(number) is not int or not 1 <= number <= _LARGEST for shape in patches for number in shape):
        return f"layout.patches = {layout.patches}"
    if layout.parts > _MOST_PARTS or max(layout.part, layout.views, layout.width) > _LARGEST:
        return f"{layout.parts} parts of {layout.part} samples, {layout.views} views of width {layout.width}"
    if not isinstance(key, dict) or not isinstance(manifest.made, dict) or type(key.get("seed")) is not int:
        return "key and made are not what a store's are"
    data = key.get("data", {})
    if not isinstance(data, dict):
        return f"key.data = {data!r}"
    if data.get("samples", layout.samples) != layout.samples:
        return f"layout.samples = {layout.samples}, of data with {data['samples']}"
    scalars = (manifest.scale, 0.0 if manifest.bias is None else manifest.bias)
    if not all(isinstance(value, float | int) and abs(value) <= sys.float_info.max for value in scalars) or manifest.scale <= 0:
        return f"scale = {manifest.scale!r:.80}, bias = {manifest.bias!r:.80}"
    if manifest.parts and len(manifest.parts) != layout.parts:
        return f"{len(manifest.parts)} parts are listed of {layout.parts}"
    if any(not isinstance(part, dict) or not isinstance(part.get("sha256"), str) for part in manifest.parts):
        return "parts are listed without a checksum"
    return None


def differences(store: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lines 'key: A in the store, B in the recipe' for every entry of the nested keys that differs; empty when the store may be used.

    Weights are equal when their checksums are, or their names where one side has no checksum.
    """
    mine, theirs = ({key: value for key, value in flat(side).items() if value != {}} for side in (store, wanted))
    name, digest = "weights.name", "weights.sha256"
    by_digest = mine.get(digest) is not None and theirs.get(digest) is not None
    ignored = {name} if by_digest else {digest}
    keys = [key for key in sorted(mine.keys() | theirs.keys()) if key not in ignored and mine.get(key) != theirs.get(key)]
    return [f"{key}: {mine.get(key)!r} in the store, {theirs.get(key)!r} in the recipe" for key in keys]


def made_as_wanted(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """How a store was computed; what older stores do not say is as it was then: an integer product, no calibration."""
    then: dict[str, Any] = dict.fromkeys(wanted)
    if made.get("int8"):
        product = wanted.get("product")
        then["product"] = product if product in INTEGER_PRODUCTS else " or ".join(INTEGER_PRODUCTS)
    return {**then, **made}
