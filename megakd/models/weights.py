"""Files of weights, one tensor at a time: names and shapes from the header, values when they are read.

Reads safetensors, in one file or in several with an index. `.pt`, `.pth` and `.bin` are converted to safetensors once, by torch's
restricted unpickler: nothing in them is executed. Files are not memory-mapped: mapped pages count as the process's memory, and if the
file shrinks or its disk is lost the process ends by a signal instead of an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megakd.models.weight_kinds import recognise, unpickled
from megakd.recipe import texts
from megakd.runtime.files import atomic_file, partials, safetensors_header, sync, users_cache

Shape = tuple[int, ...]
INDEX_SUFFIX = ".safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ABANDONED_SECONDS = 3600  # a running conversion writes all the time; an older partial file is of one that was killed


class Weights(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    @property
    def origin(self) -> str:
        """Its name in messages."""
        ...

    def read(self, name: str) -> Tensor: ...


class InMemory:
    """Weights that are in memory already, such as freshly drawn ones."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        self._tensors, self.origin = tensors, origin
        self.shapes: Mapping[str, Shape] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()


@dataclass(frozen=True)
class _Place:
    path: Path
    dtype: torch.dtype
    shape: Shape
    start: int
    length: int


class SafetensorsFiles:
    """One `.safetensors` file, or the files that a `.safetensors.index.json` names. `bytes_read` counts what `read` took from disk."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError naming the file that is missing, truncated, damaged or not of this format."""
        self.origin, self.bytes_read = str(path), 0
        self._places = _indexed(path) if path.name.endswith(INDEX_SUFFIX) else _header(path)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: place.shape for name, place in self._places.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own. Raises ValueError when the file has become too short for it, and OSError."""
        place = self._places[name]
        raw = torch.empty(place.length, dtype=torch.uint8)
        with place.path.open("rb") as file:
            file.seek(place.start)
            count = file.readinto(_bytes(raw)) if place.length else 0
        if count != place.length:
            raise ValueError(f"{place.path}: the file ends inside of {name!r}; it was changed while it was read")
        self.bytes_read += place.length
        return raw.view(place.dtype).reshape(place.shape)


def _bytes(raw: Tensor) -> memoryview:
    """The memory of a uint8 tensor."""
    array: Any = raw.numpy()
    return memoryview(array)


def _header(path: Path) -> dict[str, _Place]:
    try:
        recognise(path)
        # The library finds overlaps, gaps and a truncated end.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            begin, header = safetensors_header(file)
    except (SafetensorError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: no complete safetensors file, and so no file of plain tensors ({error}); it was truncated, or is something else: "
            f"copy or download it again"
        ) from None
    header.pop("__metadata__", None)
    unknown = {entry["dtype"] for entry in header.values()} - DTYPES.keys()
    if unknown:
        raise ValueError(f"{path}: tensors of type {', '.join(sorted(unknown))}, which no teacher is loaded from; give {', '.join(DTYPES)}")
    places = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        places[name] = _Place(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin + start, end - start)
    return places


def _owners(path: Path) -> dict[str, str]:
    """Tensor -> the name of its file, of an index."""
    recognise(path)
    content = texts.read_json(path, str(path))
    owners = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(owners, dict) or not owners or not all(isinstance(file, str) for file in owners.values()):
        raise ValueError(f"{path}: no index of safetensors files: it has no table weight_map of tensors' names to files' names")
    outside = sorted({name for name in owners.values() if Path(name).name != name or not name.endswith(".safetensors")})
    if outside:
        raise ValueError(
            f"{path}: names {outside[0]!r}, which is no .safetensors file and not beside it; an index and its files share one folder"
        )
    return owners


def shards(path: Path) -> list[Path]:
    """The files that an index names, in order of their names; none for another file. Raises ValueError as `SafetensorsFiles` does."""
    return [path.with_name(name) for name in sorted(set(_owners(path).values()))] if path.name.endswith(INDEX_SUFFIX) else []


def _indexed(path: Path) -> dict[str, _Place]:
    owners = _owners(path)
    files = {name: _header(path.with_name(name)) for name in sorted(set(owners.values()))}
    absent = [tensor for tensor, file in owners.items() if tensor not in files[file]]
    if absent:
        raise ValueError(f"{path}: {absent[0]!r} and {len(absent) - 1} more are not in the files that the index names for them")
    return {tensor: files[file][tensor] for tensor, file in owners.items()}


def write(path: Path, layout: Mapping[str, tuple[torch.dtype, Shape]], tensors: Callable[[str], Tensor]) -> None:
    """Write a safetensors file tensor by tensor: `tensors` gives each one when it is written, and no other is in memory.

    The file appears under its name when it is complete. Raises ValueError for a type that is not in DTYPES.
    """
    header, offset = {}, 0
    for name, (dtype, shape) in layout.items():
        if dtype not in NAMES:
            raise ValueError(f"{name}: a tensor of {dtype} cannot be written to {path}")
        length = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with atomic_file(path) as partial:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, (dtype, shape) in layout.items():
                tensor = tensors(name)
                assert tensor.dtype == dtype
                assert tuple(tensor.shape) == tuple(shape)
                file.write(_bytes(tensor.detach().contiguous().flatten().view(torch.uint8)))
        sync(partial)


def open_weights(path: Path, cache: Path | None = None) -> SafetensorsFiles:
    """The weights in `path`; a pickled file (`.pt`, `.pth`, `.bin`) through its conversion.

    cache: folder for conversions; default: beside the file, or in the user's cache folder where that cannot be written.
    Raises ValueError as `SafetensorsFiles` and `convert` do.
    """
    if path.name.endswith((".safetensors", INDEX_SUFFIX)):
        return SafetensorsFiles(path)
    recognise(path)
    weights = SafetensorsFiles(convert(path, cache))
    weights.origin = str(path)
    return weights


def in_memory(path: Path, *, mapped: bool = False) -> Weights:
    """The weights in `path`, a pickled file's all at once: for a model that will be in memory as a whole. Raises as `open_weights` does.

    mapped: a pickled file's from the file, when they are read: for a look at their names and shapes.
    """
    if path.name.endswith((".safetensors", INDEX_SUFFIX)):
        return SafetensorsFiles(path)
    return InMemory(unpickled(path, mapped=mapped), str(path))


def convert(path: Path, cache: Path | None = None) -> Path:
    """The safetensors file with the tensors of a pickled one, written now if it does not exist yet.

    Its name holds the original's size and time of change, so that a changed original is converted again. Raises ValueError for a file
    that holds anything but named tensors, and when no folder for it can be written.
    """
    status = path.stat()
    name = f"{path.stem}-{status.st_size}-{status.st_mtime_ns}.safetensors"
    by_path = Path("megakd", "weights", hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16])
    beside = [path.parent, *([] if (users := users_cache()) is None else [users / by_path])]
    folders = beside if cache is None else [cache]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    writable = next((folder for folder in folders if _writable(folder)), None)
    if writable is None:
        raise ValueError(f"{path}: its conversion to safetensors can be written neither to {' nor to '.join(map(str, folders))}")
    for partial in partials(writable / name):
        if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
            partial.unlink(missing_ok=True)
    tensors = unpickled(path, mapped=True)
    layout = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    write(writable / name, layout, tensors.__getitem__)
    return writable / name


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for a message: the first ones, and how many more there are."""
    ordered = sorted(name or "a tensor without a name" for name in names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
