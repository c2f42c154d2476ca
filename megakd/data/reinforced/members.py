"""The members of a sample that holds embeddings: parsed without running what they say, within bounds of size.

Legend: V views of an image, T texts of a sample, W width of a row.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megakd.data.augmentation import Operation
from megakd.data.bad_samples import BadSample
from megakd.data.caption_tokens import as_text
from megakd.data.reinforced.replay import OPERATIONS, RecordedView

AUGMENTATIONS, NUMPY, TORCH = "paug.json", "npz", "pth.gz"
IMAGES, TEXTS = "image_emb", "text_emb"
# Bytes of a sample's embeddings, unpacked. 30 views and 6 texts of 1536 numbers in float32 are 221 thousand.
LARGEST = 32 << 20
_MOST_VIEWS = 4096


def augmentations(data: bytes) -> tuple[RecordedView, ...]:
    """The V augmentations of .paug.json. Raises BadSample, bad_embedding, for what is none."""
    try:
        listed = json.loads(as_text(data))["param_aug"]
        if isinstance(listed, str):
            listed = json.loads(listed)
        if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_VIEWS:
            raise ValueError("param_aug is no list of augmentations")
        return tuple(map(_augmentation, listed))
    except BadSample as bad:
        raise BadSample("bad_embedding", f".{AUGMENTATIONS}: {bad.detail}") from bad
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSample("bad_embedding", f".{AUGMENTATIONS}: {_shown(error)}") from error


def _augmentation(parts: Any) -> RecordedView:
    """Of [crop, flip, operations], of which a set may lack the last two. Raises ValueError or TypeError for another form."""
    crop, *rest = parts
    top, left, height, width = crop
    if any(type(number) is not int or number < 0 for number in crop) or not height or not width:
        raise ValueError(f"{crop} is no crop [top, left, height, width]")
    flip, operations = False, list[Operation]()
    for part in rest:
        if isinstance(part, bool):
            flip = part
        elif isinstance(part, list):
            operations += [_operation(*pair) for pair in part]
        elif part is not None:
            raise ValueError(f"{part!r} is neither a flip nor a list of operations")
    return RecordedView(top, left, height, width, flip, tuple(operations))


def _operation(number: Any, magnitude: Any) -> Operation:
    if type(number) is not int or not 0 <= number < len(OPERATIONS) or not isinstance(magnitude, int | float):
        raise ValueError(f"[{number!r}, {magnitude!r}] is no operation")
    if not math.isfinite(magnitude):
        raise ValueError(f"a magnitude of {magnitude}")
    return Operation(OPERATIONS[number], float(magnitude))


def embeddings(numpy: bytes | None, pickled: bytes | None, names: Iterable[str]) -> dict[str, Tensor]:
    """Of the arrays `names`, those that the sample has, (rows, W) each, in the type that they are stored in, all of one width.

    numpy: the member .npz, which counts where there are both, as it holds float32; pickled: .pth.gz.
    Raises BadSample: missing_embedding without either, bad_embedding for what is damaged, too large, or holds anything but numbers.
    """
    kind = NUMPY if numpy else TORCH
    try:
        if numpy:
            found = _of_numpy(numpy, names)
        elif pickled:
            found = _of_torch(pickled, names)
        else:
            raise BadSample("missing_embedding", f"neither a .{NUMPY} nor a .{TORCH} member")
        lacking = [name for name in (IMAGES, TEXTS) if name not in found]
        if lacking:
            raise ValueError(f"it holds no {lacking[0]}")
        for name, rows in found.items():
            if rows.ndim != 2 or not len(rows) or rows.shape[1] != found[IMAGES].shape[1]:
                raise ValueError(f"{name} has the shape {tuple(rows.shape)} beside {IMAGES} of {tuple(found[IMAGES].shape)}")
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # zipfile, gzip, numpy's and torch's readers raise their libraries' own types for damaged bytes
        raise BadSample("bad_embedding", f".{kind}: {_shown(error)}") from error
    return found


def _of_numpy(data: bytes, names: Iterable[str]) -> dict[str, Tensor]:
    """numpy's own reader would allocate what an array's header claims, before it finds that the bytes are not there."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        there = {info.filename: info for info in archive.infolist()}
        wanted = {name: there[f"{name}.npy"] for name in names if f"{name}.npy" in there}
        _check_size(sum(info.file_size for info in wanted.values()))
        for name, info in wanted.items():
            found[name] = torch.from_numpy(_array(archive.read(info)))
    return found


def _array(content: bytes) -> NDArray[Any]:
    file = io.BytesIO(content)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(file)]
    shape, fortran, kind = read_header(file)
    if kind.kind != "f" or kind.itemsize not in (2, 4, 8):
        raise ValueError(f"an array of {kind}, not of floating-point numbers")
    if math.prod(shape) * kind.itemsize != len(content) - file.tell():
        raise ValueError(f"an array of the shape {shape} in {len(content)} bytes")
    values = np.frombuffer(content, kind, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
    return values.astype(kind.newbyteorder("="))  # a copy: torch takes neither read-only memory nor another machine's order


def _of_torch(data: bytes, names: Iterable[str]) -> dict[str, Tensor]:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        content = file.read(LARGEST + 1)
    _check_size(len(content))
    # The older format of torch.save allocates what its pickle claims; a zip's entries could be packed once more.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        _check_size(sum(info.file_size for info in archive.infolist()))
    held = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(held, dict):
        raise ValueError(f"it holds a {type(held).__name__}, not a dict")
    found = {name: held[name] for name in names if name in held}
    for name, rows in found.items():
        if not isinstance(rows, Tensor) or rows.layout != torch.strided or not rows.is_floating_point() or rows.is_quantized:
            raise ValueError(f"{name} is no tensor of floating-point numbers")
        _check_size(rows.numel() * rows.itemsize)  # an expanded one is larger than its file
    return found


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"more than {LARGEST} bytes, which no sample's embeddings have")


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
