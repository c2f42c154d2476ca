"""Teacher embeddings on disk, computed once and read in every epoch: the format, and its reader.

    STORE/
        manifest.json               `key`: all that the embeddings depend on; `layout`; the parts with their checksums once all are there
        parts/000000.safetensors    samples [0, N): image (N, V, D), text (N, D), known (N,) of uint8, and where patch tokens are
                                    stored patches.BLOCK (N, V, h, w, C) of each block, numbered from 0, averaged to the grid h x w;
                                    of samples with several captions text (T, D), one sample's after the other's, and captions (N,) of
                                    int32, how many each has
        lock                        held by the job that writes, see `writer`

A part is one file, complete or absent, whose header names its store. Files are mapped into memory, so that the ranks and workers of a node
share one page cache, and rows are read alone, patch tokens where they are asked for. A part's header has the CRC-32 of each row, of the V
images, then of the text with its byte of `known`, then of each block's V views; with several captions of the number of a sample's in the
place of its text, and of each of the T texts. Parts of format 1 have none and are compared with their
SHA-256 at a process's first read. A row that is not as it was written counts as damaged, and is used as if the store lacked it.

Legend: N samples of a part, T captions of them, V views, D embedding width, B rows asked for, h x w a grid of patches, C a block's width.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megakd.data.store.manifest import MANIFEST, Layout, Manifest, StoreError, StoreType, differences, made_as_wanted, read_manifest
from megakd.runtime.files import safetensors_header

PARTS = "parts"
NOTE = "megakd"  # the one metadata entry of a part's header: the order of several is not the same in every process
_NUMPY: dict[StoreType, type] = {"bf16": np.int16, "fp32": np.float32}  # numpy has no bf16: its bits are int16
_HEADER: dict[StoreType, str] = {"bf16": "BF16", "fp32": "F32"}
_OPEN_PARTS = 1024  # far below the kernel's limit of 65530 maps a process
_HEADER_THREADS = 16
_LARGEST_HEADER = 1 << 26  # ours have some 100 KB; a damaged length must not make us read gigabytes


class StoredRows(NamedTuple):
    """Of B samples: image and text (B, D) in the store's type, zeros where not known; known and damaged (B,) bool.

    patches: (B, h, w, C) likewise, by the keys of `Store.asked`.
    """

    image: Tensor
    text: Tensor
    known: Tensor
    damaged: Tensor
    patches: dict[int, Tensor] = {}  # noqa: RUF012  (NamedTuple default; never mutated)


@dataclass(frozen=True)
class PartFile:
    """A part on disk: where its tensors begin in the file, and what its header says.

    known: samples it has embeddings of; texts: captions of them, where a sample may have several.
    """

    offsets: dict[str, int]
    sha256: str
    known: int
    texts: int = 0


def part_path(folder: Path, number: int) -> Path:
    return folder / PARTS / f"{number:06d}.safetensors"


def read_part(folder: Path, manifest: Manifest, number: int) -> PartFile:
    """The header of a part, checked against the file's length and the manifest. Raises StoreError naming the file and its defect."""
    path, layout = part_path(folder, number), manifest.layout
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin, header, note = _header(file)
            texts = 0 if layout.captions is None else int(note["texts"])
            shapes = layout.shapes(number, texts)
            types = {name: {"known": "U8", "captions": "I32"}.get(name, _HEADER[layout.dtype]) for name in shapes}
            described = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for name in shapes}
            spans = {name: (int(first), int(end)) for name in shapes for first, end in [header[name]["data_offsets"]]}
            facts = PartFile({name: begin + span[0] for name, span in spans.items()}, str(note["sha256"]), int(note["known"]), texts)
            file.seek(facts.offsets["known"] if 0 <= facts.offsets["known"] <= size else 0)
            known = np.frombuffer(file.read(layout.count(number)), np.uint8)
            several = 0 if layout.captions is None else _sum_of_captions(file, facts.offsets["captions"], layout.count(number))
        owner = (note["store"], note["number"], facts.sha256)
        _checks(note, layout, number)
        _text_checks(note, texts)
    except FileNotFoundError as error:
        raise StoreError(f"{path}: missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise StoreError(f"{path}: no part of a store ({error!r})") from error
    if described != {name: (types[name], shape) for name, shape in shapes.items()}:
        raise StoreError(f"{path}: its tensors are {described}, not those of the manifest's layout")
    if (expected := begin + max(end for _, end in spans.values())) != size:
        raise StoreError(f"{path}: {size} bytes instead of {expected}")
    # save_file sorts tensors of one type by name, such as image before text: swapped, they would be read as each other
    bytes_of = {"BF16": 2, "F32": 4, "U8": 1, "I32": 4}
    lengths = {name: math.prod(shape) * bytes_of[types[name]] for name, shape in shapes.items()}
    ordered = sorted(spans.values())
    tiled = [0, *(end for _, end in ordered)] == [*(first for first, _ in ordered), size - begin]
    valued = sorted(name for name in spans if types[name] == _HEADER[layout.dtype])
    swapped = sorted(valued, key=lambda name: spans[name]) != valued
    if not tiled or any(end - first != lengths[name] for name, (first, end) in spans.items()) or swapped:
        raise StoreError(f"{path}: its tensors do not lie where they were written: {spans}")
    listed = manifest.parts[number]["sha256"] if manifest.parts else facts.sha256
    if owner != (manifest.digest, number, listed):
        raise StoreError(f"{path}: a part of another store")
    if int(known.sum()) != facts.known or int(known.max()) > 1 or several != texts:
        raise StoreError(f"{path}: which of its samples have embeddings was changed after it was written")
    return facts


def _header(file: BinaryIO) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Where the tensors' bytes begin, the header, and the note in it. Raises ValueError, KeyError or TypeError for anything else."""
    begin, header = safetensors_header(file, _LARGEST_HEADER)
    return begin, header, json.loads(header["__metadata__"][NOTE])


def _checks(note: Mapping[str, Any], layout: Layout, number: int) -> NDArray[np.int32] | None:
    """As `row_checks`, from a part's note; None for one of format 1. Raises ValueError where they are of another number."""
    if "checks" not in note:
        return None
    return np.frombuffer(base64.b64decode(note["checks"], validate=True), "<i4").reshape(layout.count(number), layout.checks)


def _sum_of_captions(file: BinaryIO, offset: int, count: int) -> int:
    file.seek(max(0, offset))
    return int(np.frombuffer(file.read(4 * count), "<i4").sum(dtype=np.int64))


def _text_checks(note: Mapping[str, Any], texts: int) -> NDArray[np.int32]:
    """(T,), of the texts of a part with several captions. Raises ValueError where they are of another number."""
    return np.frombuffer(base64.b64decode(note.get("text_checks", ""), validate=True), "<i4").reshape(texts)


def map_part(folder: Path, manifest: Manifest, number: int, facts: PartFile) -> dict[str, NDArray[Any]]:
    """The part's arrays by the names of `Layout.shapes`, mapped read-only: of float32 or of bf16 bits as int16, known of uint8.

    And read, where the part has them, checks of int32, as `row_checks`, and with several captions text_checks (T,) of int32 and
    first (N + 1,) of int64, where each sample's begin.
    """
    path, layout = part_path(folder, number), manifest.layout
    values: Any = _NUMPY[layout.dtype]
    of_type: dict[str, Any] = {"known": np.uint8, "captions": np.int32}
    arrays: dict[str, NDArray[Any]] = {
        name: np.memmap(path, of_type.get(name, values), "r", offset=facts.offsets[name], shape=shape)
        if math.prod(shape)
        else np.zeros(shape, of_type.get(name, values))  # nothing can be mapped of a part whose samples are all unusable
        for name, shape in layout.shapes(number, facts.texts).items()
    }
    with path.open("rb") as file:
        note = _header(file)[2]
    checks = _checks(note, layout, number)
    if layout.captions is not None:
        arrays |= {"text_checks": _text_checks(note, facts.texts), "first": np.append(0, np.cumsum(arrays["captions"], dtype=np.int64))}
    return arrays if checks is None else {**arrays, "checks": checks}


def row_checks(
    image_NVD: NDArray[Any], text_ND: NDArray[Any], known_N: NDArray[Any], patches: Sequence[NDArray[Any]] = ()
) -> NDArray[np.int32]:
    """CRC-32 of each row, (N, V + 1 + V * blocks): of the views' bytes, of the text's with its byte of `known`, of each block's views.

    patches: (N, V, h, w, C) of each block. Of a part with several captions text_ND is how many each sample has, (N, 1) int32.
    """
    texts = [[zlib.crc32(bytes([known]), zlib.crc32(row.tobytes()))] for row, known in zip(text_ND, known_N.tolist(), strict=True)]
    images, *blocks = ([[zlib.crc32(view.tobytes()) for view in views] for views in values] for values in (image_NVD, *patches))
    return np.concatenate([np.array(part, "<u4") for part in (images, texts, *blocks)], axis=1).view("<i4")


def text_checks(text_TD: NDArray[Any]) -> NDArray[np.int32]:
    """CRC-32 of each row, (T,)."""
    return np.array([zlib.crc32(row.tobytes()) for row in text_TD], "<u4").view("<i4")


def content_digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of a part's values: image, text, known and numbers of captions, then patch tokens in the order of their names."""
    digest = hashlib.sha256()
    for name in (
        "image",
        "text",
        "known",
        *(["captions"] if "captions" in arrays else []),
        *sorted(name for name in arrays if name.startswith("patches.")),
    ):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def to_tensor(values: NDArray[Any]) -> Tensor:
    """A copy of mapped rows, in the store's type. int16 values are bf16 bits."""
    tensor = torch.from_numpy(np.array(values))
    return tensor.view(torch.bfloat16) if values.dtype == np.int16 else tensor


@dataclass
class Store:
    """A store for reading. Cheap to pickle and to fork: parts are mapped where they are first needed.

    parts: the whole ones, by number. Unknown are samples of the others, and those that could not be read when the store was made.
    asked: blocks whose patch tokens `read` gives, as objectives count them, with their numbers in the store.
    """

    folder: Path
    manifest: Manifest
    parts: dict[int, PartFile]
    defects: list[str]  # why the other parts cannot be used
    asked: dict[int, int] = field(default_factory=dict)
    _maps: OrderedDict[int, dict[str, NDArray[Any]]] = field(default_factory=OrderedDict)
    _compared: dict[int, bool] = field(default_factory=dict)  # parts without checks: whether they are as they were written

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Reads the manifest and every part's header, on rank 0; the other ranks are sent the result.

        Raises StoreError when there is no store; a part that is missing, cut short or of another store is a defect.
        """
        manifest = read_manifest(folder)
        if manifest is None:
            raise StoreError(f"{folder}: no store of embeddings (it has no {MANIFEST}); `megakd embed --out {folder}` makes one")

        def part_or_defect(number: int) -> PartFile | str:
            try:
                return read_part(folder, manifest, number)
            except StoreError as error:
                return str(error)

        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            results = list(pool.map(part_or_defect, range(manifest.layout.parts)))
        parts = {number: part for number, part in enumerate(results) if isinstance(part, PartFile)}
        return cls(folder, manifest, parts, [defect for defect in results if isinstance(defect, str)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict(), "_compared": {}}

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    def check_matches(self, wanted: Mapping[str, Any], ignore: tuple[str, ...] = (), made: Mapping[str, Any] | None = None) -> None:
        """Raises StoreError with every difference between the store's key and the recipe's, but for keys that begin with one of `ignore`.

        made: how the recipe would compute embeddings here; None does not compare it.
        """
        lines = [line for line in differences(self.manifest.key, wanted) if not line.startswith(ignore)]
        if made is not None:
            lines += differences({"made": made_as_wanted(self.manifest.made, made)}, {"made": made})
        if lines:
            # Random weights are drawn from the run's seed, so that there the augmentation's alone is no way out.
            of_seed = any(line.startswith("seed:") for line in lines) and not any(line.startswith("weights.") for line in lines)
            remedy = f"set views.seed to {self.manifest.seed}, which leaves the run its own seed, or " if of_seed else ""
            raise StoreError(
                f"{self.folder}: this store holds other embeddings than the recipe asks for:\n  " + "\n  ".join(lines) + "\n"
                f"{remedy}give the store of this recipe, change the recipe to the store's settings, or make one with `megakd embed`"
            )

    def outline(self) -> str:
        """For people: what is used, and what is not there."""
        layout, known = self.layout, sum(part.known for part in self.parts.values())
        lines = [f"teacher's embeddings from {self.folder}: {known} of {layout.samples} samples, {layout.views} views each, {layout.dtype}"]
        if layout.patches is not None:
            lines[0] += f"; {layout.patches}" + ("" if self.asked else ", which no objective reads")
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

    def view_at(self, epoch: int) -> int:
        """The view in an epoch: every one takes the next, and after V epochs the first comes again."""
        return epoch % self.layout.views

    def read(self, index_B: NDArray[np.int64], view_B: NDArray[np.int64], caption_B: NDArray[np.int64] | None = None) -> StoredRows:
        """The embeddings of samples `index_B` in their views `view_B`. Raises StoreError when a part vanishes while it is in use.

        caption_B: the numbers of the captions among the samples' own, as `data.captions` orders them; None: the first of each.
        """
        layout, count = self.layout, len(index_B)
        image_BD = torch.zeros((count, layout.width), dtype=layout.torch_dtype)
        text_BD, known_B, damaged_B = torch.zeros_like(image_BD), torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        named = {block: f"patches.{number}" for block, number in self.asked.items()}
        of_blocks = [(place, key, shape) for place, (key, shape) in enumerate(layout.patch_tensors.items()) if key in named.values()]
        patches = {key: torch.zeros((count, *shape), dtype=layout.torch_dtype) for _, key, shape in of_blocks}
        part_B = index_B // layout.part
        for number in np.unique(part_B).tolist():
            if number not in self.parts:
                continue
            arrays = self._arrays(number)
            rows = np.flatnonzero(part_B == number)
            inside, view = index_B[rows] - number * layout.part, view_B[rows]
            image, known = arrays["image"][inside, view], arrays["known"][inside]
            text, of_text, has_text = self._texts(arrays, inside, None if caption_B is None else caption_B[rows])
            maps = {key: arrays[key][inside, view] for key in patches}
            if "checks" in arrays:
                columns: list[Any] = [view, layout.views, *(layout.views * (1 + place) + 1 + view for place, _, _ in of_blocks)]
                checks = np.stack([arrays["checks"][inside, column] for column in columns], 1)
                sound = (row_checks(image[:, None], of_text, known, [one[:, None] for one in maps.values()]) == checks).all(axis=1)
            else:
                sound = np.full(len(rows), self._as_written(number, arrays))
            sound &= has_text | (known == 0)
            damaged_B[torch.from_numpy(rows[~sound])] = True
            used = sound & (known == 1)
            where = torch.from_numpy(rows[used])
            image_BD[where], text_BD[where], known_B[where] = to_tensor(image[used]), to_tensor(text[used]), True
            for key, map_RhwC in maps.items():
                patches[key][where] = to_tensor(map_RhwC[used])
        return StoredRows(image_BD, text_BD, known_B, damaged_B, {block: patches[key] for block, key in named.items()})

    def _texts(
        self, arrays: Mapping[str, NDArray[Any]], inside: NDArray[np.int64], number: NDArray[np.int64] | None
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
        """(rows of text, what of a sample's text enters `row_checks`, whether the row is there as it was written)."""
        if "captions" not in arrays:
            text = arrays["text"][inside]
            return text, text, np.ones(len(inside), np.bool_)
        number = np.zeros(len(inside), np.int64) if number is None else number
        count, there = arrays["captions"][inside], np.flatnonzero(number < arrays["captions"][inside])
        text, sound = np.zeros((len(inside), self.layout.width), arrays["text"].dtype), np.zeros(len(inside), np.bool_)
        row = arrays["first"][inside[there]] + number[there]
        text[there] = arrays["text"][row]
        sound[there] = text_checks(text[there]) == arrays["text_checks"][row]
        return text, count[:, None], sound

    def _as_written(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Of a part without checks, which is read whole once a process."""
        if number not in self._compared:
            self._compared[number] = content_digest(arrays) == self.parts[number].sha256
        return self._compared[number]

    def _arrays(self, number: int) -> dict[str, NDArray[Any]]:
        if number not in self._maps:
            while len(self._maps) >= _OPEN_PARTS:
                self._maps.popitem(last=False)
            try:
                self._maps[number] = map_part(self.folder, self.manifest, number, self.parts[number])
            except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: the file is shorter than the map
                path = part_path(self.folder, number)
                raise StoreError(f"{path}: gone or changed since the run began ({error}); put it back, or run `megakd embed`") from error
        self._maps.move_to_end(number)
        return self._maps[number]
