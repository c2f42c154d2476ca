"""The manifest of a store of embeddings: what they depend on, their layout in parts, and the teacher's scale."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megakd.recipe.texts import flat
from megakd.runtime.files import json_sha256

FORMAT = 2
MANIFEST = "manifest.json"
INTEGER_PRODUCTS = ("int_mm", "bitsandbytes")
StoreType = Literal["bf16", "fp32"]
_TORCH: dict[StoreType, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Far above any store's: by a damaged number parts would be listed for hours.
_MOST_PARTS, _LARGEST = 10**7, 1 << 24


class StoreError(ValueError):
    """A store that cannot be read or written; the message says which file, why, and what to do."""


@dataclass(frozen=True)
class Layout:
    """Part p holds the samples [p * part, (p + 1) * part), the last one fewer."""

    samples: int
    part: int
    views: int
    width: int
    dtype: StoreType

    @property
    def parts(self) -> int:
        return -(-self.samples // self.part)

    def count(self, number: int) -> int:
        """Samples N of a part."""
        return min(self.part, self.samples - number * self.part)

    def shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        count = self.count(number)
        return {"image": (count, self.views, self.width), "text": (count, self.width), "known": (count,)}

    @property
    def torch_dtype(self) -> torch.dtype:
        return _TORCH[self.dtype]


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
        return hashlib.sha256(json.dumps([self.key, self.made, asdict(self.layout)], sort_keys=True).encode()).hexdigest()

    @property
    def seed(self) -> int:
        """Of the augmentations."""
        return int(self.key["seed"])

    def to_json(self) -> dict[str, Any]:
        content = {"format": FORMAT, **asdict(self), "parts": list(self.parts)}
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
        if version not in (1, FORMAT):
            raise StoreError(f"{path}: format {version}, this version reads format 1 and {FORMAT}; make the store anew")
        if (version == FORMAT or checksum is not None) and checksum != json_sha256(content):
            raise StoreError(f"{path}: was changed after it was written; {remedy}")
        layout = Layout(**content["layout"])
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
    if layout.dtype not in _TORCH:
        return f"layout.dtype = {layout.dtype!r}"
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
