"""Teacher embeddings on disk, computed once and read in every epoch: the format, and its reader.

    STORE/
        manifest.json               `key`: all that the embeddings depend on; `layout`; the parts with their checksums once all are there
        parts/000000.safetensors    samples [0, N): image (N, V, D), text (N, D), known (N,) of uint8
        lock                        held by the job that writes, see `store_writer`

A part is one file, complete or absent: it is renamed into place, and its header names the store it belongs to. Reading maps the
files into memory, so that the ranks and workers of a node share one page cache, and asks for rows alone.

Legend: N samples of a part, V views, D embedding width, B rows asked for.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FORMAT = 1
INTEGER_PRODUCTS = ("int_mm", "bitsandbytes")
MANIFEST, PARTS = "manifest.json", "parts"
NOTE = "megakd"  # the one metadata entry of a part's header: the order of several is not the same in every process
StoreType = Literal["bf16", "fp32"]
_TORCH: dict[StoreType, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NUMPY: dict[StoreType, type] = {"bf16": np.int16, "fp32": np.float32}  # numpy has no bf16: its bits travel as int16
_HEADER: dict[StoreType, str] = {"bf16": "BF16", "fp32": "F32"}
# As for the shards' indexes: far below the kernel's limit of 65530 maps a process.
_OPEN_PARTS = 1024
_HEADER_THREADS = 16
_LARGEST_HEADER = 1 << 16  # ours have less than a kilobyte; a damaged length must not make us read gigabytes


class StoreError(ValueError):
    """A store that cannot be read or written; the message says which file, why, and what to do."""


class Rows(NamedTuple):
    """What a store says of B samples: image and text (B, D) in the store's type, known (B,) bool. Unknown rows are zero."""

    image: Tensor
    text: Tensor
    known: Tensor


@dataclass(frozen=True)
class Layout:
    """How samples lie in parts: part p holds the samples [p * part, (p + 1) * part), the last one fewer."""

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
    """key: what the embeddings depend on, nested; made: how they were computed, the same for all parts of a store.

    scale, bias: the teacher's, of `Embeddings`. parts: number -> facts of its header; empty until the store is complete.
    """

    key: dict[str, Any]
    made: dict[str, Any]
    layout: Layout
    scale: float
    bias: float | None
    parts: tuple[dict[str, Any], ...] = ()

    @property
    def digest(self) -> str:
        """What a part's header holds of its store, so that a part of another one is not taken for its own."""
        return hashlib.sha256(json.dumps([self.key, self.made, asdict(self.layout)], sort_keys=True).encode()).hexdigest()

    @property
    def seed(self) -> int:
        """The augmentation's seed."""
        return int(self.key["seed"])

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "parts": list(self.parts)}


@dataclass(frozen=True)
class PartFile:
    """A part that is there: where its tensors begin in the file, and what its header says. known: samples it has embeddings of."""

    offsets: dict[str, int]
    sha256: str
    known: int


def part_path(folder: Path, number: int) -> Path:
    return folder / PARTS / f"{number:06d}.safetensors"


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none. Raises StoreError for one that cannot be read or is of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise StoreError(f"{path}: format {found['format']}, this version reads format {FORMAT}; make the store anew")
        layout = Layout(**found["layout"])
        return Manifest(found["key"], found["made"], layout, found["scale"], found["bias"], tuple(found["parts"]))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: no manifest of a store ({error!r}); make the store anew in another folder") from error


def differences(store: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lines 'key: A in the store, B wanted' for every entry of the nested keys that differs; empty when the store may be used.

    Weights are equal when their checksums are; their names count where one side has no checksum, for want of the file.
    """
    mine, theirs = _flat(store), _flat(wanted)
    name, digest = "weights.name", "weights.sha256"
    by_digest = mine.get(digest) is not None and theirs.get(digest) is not None
    ignored = {name} if by_digest else {digest}
    keys = [key for key in sorted(mine.keys() | theirs.keys()) if key not in ignored and mine.get(key) != theirs.get(key)]
    return [f"{key}: {mine.get(key)!r} in the store, {theirs.get(key)!r} in the recipe" for key in keys]


def made_as_wanted(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """How a store was computed, with what older ones did not write down as it was then: one of two ways with integers, no calibration."""
    then: dict[str, Any] = dict.fromkeys(wanted)
    if made.get("int8"):
        then["product"] = asked if (asked := wanted.get("product")) in INTEGER_PRODUCTS else " or ".join(INTEGER_PRODUCTS)
    return {**then, **made}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def read_part(folder: Path, manifest: Manifest, number: int) -> PartFile:
    """The header of a part, checked against the file's length and the manifest. Raises StoreError naming the file and its defect.

    The values themselves are not read: `content_digest` tells whether they have changed.
    """
    path, layout = part_path(folder, number), manifest.layout
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            header = json.loads(file.read(min(length, _LARGEST_HEADER)))
        note = json.loads(header["__metadata__"][NOTE])
        described = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for name in ("image", "text", "known")}
        spans = {name: header[name]["data_offsets"] for name in described}
        facts = PartFile({name: 8 + length + span[0] for name, span in spans.items()}, str(note["sha256"]), int(note["known"]))
    except FileNotFoundError as error:
        raise StoreError(f"{path}: missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: no part of a store ({error!r})") from error
    types = {"image": _HEADER[layout.dtype], "text": _HEADER[layout.dtype], "known": "U8"}
    if described != {name: (types[name], shape) for name, shape in layout.shapes(number).items()}:
        raise StoreError(f"{path}: its tensors are {described}, not those of the manifest's layout")
    if (expected := 8 + length + max(end for _, end in spans.values())) != size:
        raise StoreError(f"{path}: {size} bytes instead of {expected}")
    listed = manifest.parts[number]["sha256"] if manifest.parts else facts.sha256
    if (note["store"], note["number"], facts.sha256) != (manifest.digest, number, listed):
        raise StoreError(f"{path}: a part of another store")
    return facts


def map_part(folder: Path, manifest: Manifest, number: int, facts: PartFile) -> dict[str, NDArray[Any]]:
    """The part's arrays, mapped read-only: image (N, V, D) and text (N, D) of float32 or of bf16 bits as int16, known (N,) uint8."""
    path, layout = part_path(folder, number), manifest.layout
    types: dict[str, Any] = {"image": _NUMPY[layout.dtype], "text": _NUMPY[layout.dtype], "known": np.uint8}
    return {
        name: np.memmap(path, types[name], "r", offset=facts.offsets[name], shape=shape) for name, shape in layout.shapes(number).items()
    }


def content_digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of a part's values: image, text and known, one after the other."""
    found = hashlib.sha256()
    for name in ("image", "text", "known"):
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()


def to_tensor(values: NDArray[Any]) -> Tensor:
    """A copy of mapped rows, in the store's type. int16 values are bf16 bits."""
    tensor = torch.from_numpy(np.array(values))
    return tensor.view(torch.bfloat16) if values.dtype == np.int16 else tensor


@dataclass
class Store:
    """A store that is read. Cheap to pickle and to fork: parts are mapped where they are first needed.

    parts: those that are whole, by number. Samples of the others are unknown, as are those that could not be read when the store
    was made.
    """

    folder: Path
    manifest: Manifest
    parts: dict[int, PartFile]
    defects: list[str]  # why parts are not there, in words
    _maps: OrderedDict[int, dict[str, NDArray[Any]]] = field(default_factory=OrderedDict)

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Reads the manifest and every part's header: rank 0's work, the other ranks are sent the result.

        Raises StoreError when there is no store; a part that is missing, cut short or of another store is a defect, not an error.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise StoreError(f"{folder}: no store of embeddings (it has no {MANIFEST}); `megakd embed --out {folder}` makes one")
        parts: dict[int, PartFile] = {}
        defects: list[str] = []
        numbers = range(manifest.layout.parts)
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            for number, found in zip(numbers, pool.map(lambda number: _part_or_defect(folder, manifest, number), numbers), strict=True):
                if isinstance(found, PartFile):
                    parts[number] = found
                else:
                    defects.append(str(found))
        return cls(folder, manifest, parts, defects)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    def check_matches(self, wanted: Mapping[str, Any], ignore: tuple[str, ...] = (), made: Mapping[str, Any] | None = None) -> None:
        """Raises StoreError with every difference between the store's key and the recipe's, but for keys that begin as `ignore` says.

        made: how the recipe would compute embeddings here; None leaves that open.
        """
        lines = [line for line in differences(self.manifest.key, wanted) if not line.startswith(ignore)]
        if made is not None:
            lines += differences({"made": made_as_wanted(self.manifest.made, made)}, {"made": made})
        if lines:
            raise StoreError(
                f"{self.folder}: this store holds other embeddings than the recipe asks for:\n  " + "\n  ".join(lines) + "\n"
                "give the store of this recipe, change the recipe to the store's settings, or make one with `megakd embed`"
            )

    def outline(self) -> str:
        """For people: what is used, and what is not there."""
        layout, known = self.layout, sum(part.known for part in self.parts.values())
        lines = [f"teacher's embeddings from {self.folder}: {known} of {layout.samples} samples, {layout.views} views each, {layout.dtype}"]
        if self.manifest.made.get("outlier_threshold") and "product" not in self.manifest.made:
            lines += ["made by an older version with an outlier_threshold: samples depended on their neighbours in the batch, by up to 3 %"]
        if self.defects:
            lines += [f"{len(self.defects)} of {layout.parts} parts are not usable: {'; '.join(self.defects[:2])}"]
        return "\n".join(lines)

    def check_whole(self) -> None:
        """Raises StoreError when parts are not usable, with the first of them."""
        if self.defects:
            raise StoreError(
                f"{self.folder}: {len(self.defects)} of {self.layout.parts} parts are not usable; `megakd embed` without --check writes "
                f"them. The first:\n  " + "\n  ".join(self.defects[:4])
            )

    def view_at(self, position: int, epoch_length: int) -> int:
        """The view number of a position in the order: every epoch takes the next one, and after V epochs the first again."""
        return position // epoch_length % self.layout.views

    def read(self, index_B: NDArray[np.int64], view_B: NDArray[np.int64]) -> Rows:
        """The embeddings of samples `index_B` in their views `view_B`. Raises StoreError when a part vanishes while it is in use."""
        layout, count = self.layout, len(index_B)
        image_BD = torch.zeros((count, layout.width), dtype=layout.torch_dtype)
        text_BD, known_B = torch.zeros_like(image_BD), torch.zeros(count, dtype=torch.bool)
        part_B = index_B // layout.part
        for number in np.unique(part_B).tolist():
            if number not in self.parts:
                continue
            arrays = self._arrays(number)
            rows = np.flatnonzero(part_B == number)
            inside = index_B[rows] - number * layout.part
            where = torch.from_numpy(rows)
            image_BD[where] = to_tensor(arrays["image"][inside, view_B[rows]])
            text_BD[where] = to_tensor(arrays["text"][inside])
            known_B[where] = torch.from_numpy(arrays["known"][inside].astype(np.bool_))
        return Rows(image_BD, text_BD, known_B)

    def _arrays(self, number: int) -> dict[str, NDArray[Any]]:
        if number not in self._maps:
            while len(self._maps) >= _OPEN_PARTS:
                self._maps.popitem(last=False)
            try:
                self._maps[number] = map_part(self.folder, self.manifest, number, self.parts[number])
            except (OSError, ValueError) as error:  # ValueError: the file is shorter than the map
                path = part_path(self.folder, number)
                raise StoreError(f"{path}: gone or changed since the run began ({error}); put it back, or run `megakd embed`") from error
        self._maps.move_to_end(number)
        return self._maps[number]


def _part_or_defect(folder: Path, manifest: Manifest, number: int) -> PartFile | StoreError:
    try:
        return read_part(folder, manifest, number)
    except StoreError as error:
        return error
