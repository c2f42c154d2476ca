"""What kind of file a file of weights is, by its first bytes, and the tensors of a pickled one. Nothing in a file is ever executed."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("megakd.models")

PICKLED_SUFFIXES = (".pt", ".pth", ".bin")
LFS = b"version https://git-lfs.github.com/spec/"
PICKLES = (b"PK\x03\x04", b"\x80")  # since torch 1.6, and before
# Where training programs keep the model in what they save, in order of preference.
TABLES = ("state_dict", "model_state_dict", "model", "module", "student", "teacher")
AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "module_ema")
DEEPEST = 8
# A norm's largest weights are in the hundreds; a flipped bit of an exponent makes 1e30.
LARGEST = 1e8


def recognise(path: Path) -> None:
    """Raises ValueError, naming what the file is and the remedy, when its first bytes do not fit its suffix."""
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        raise ValueError(f"{path}: a folder; name the file of weights in it, or set model = 'local-dir:{path}' and no pretrained")
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(512)
    refusal = "no complete safetensors file" if path.name.endswith(".safetensors") else "no file of plain tensors"
    if not start:
        raise ValueError(f"{path}: {refusal}: it is empty; copy or download it again")
    if start.startswith(LFS):
        raise ValueError(
            f"{path}: {refusal}: it is a Git LFS pointer to the weights: run `git lfs pull` in its repository, or download the file itself"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path}: {refusal}: it is a web page; open the address in a browser, and download what it leads to")
    has_header = start[8:9] == b"{"  # safetensors: after the header's length, whose first byte may be that of a pickle
    pickled = start.startswith(PICKLES) and not has_header
    if path.name.endswith(".safetensors") and pickled:
        raise ValueError(f"{path}: {refusal}: it is a pickled one of PyTorch; rename it to {path.stem}.pt")
    if path.name.endswith(PICKLED_SUFFIXES) and has_header:
        raise ValueError(f"{path}: {refusal}: it is a safetensors file under another suffix; rename it to {path.stem}.safetensors")
    if pickled and start.startswith(b"PK") and _is_script(path):
        raise ValueError(
            f"{path}: {refusal} but a TorchScript archive, as OpenAI published its models: a program, and none is ever executed; "
            f"take the tag 'openai' of the -quickgelu model, which has the same weights as plain tensors"
        )


def _is_script(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False  # the restricted unpickler's error is more precise


def unpickled(path: Path, *, mapped: bool) -> dict[str, Tensor]:
    """The model's tensors in a pickled file, by torch's restricted unpickler. mapped: read from the file as they are needed.

    Nested tables are searched: a training program's (`{"epoch": ..., "state_dict": ...}`), and separate towers (`{"visual": ...}`).
    Raises ValueError for a file that holds anything but named tensors, or several models.
    """
    recognise(path)
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6: not mappable
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch's parser raises EINVAL for a damaged archive
            raise
        # A damaged file makes torch's parser raise anything. Its message for a file with code advises to execute it.
        kind = "code or objects" if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise ValueError(
            f"{path}: no file of plain tensors ({kind}), and nothing in it is ever executed; it is damaged, or convert it to "
            f".safetensors where you trust it"
        ) from None
    tensors = _tensors(_model(content, path, DEEPEST), path)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
            raise ValueError(f"{path}: {name!r} is no plain tensor of numbers (sparse, quantised, complex or empty); save it as one")
    return tensors


def _model(content: Any, path: Path, depth: int) -> Any:
    """The table of the model in what a training program saved."""
    if not isinstance(content, Mapping) or depth == 0:
        return content
    tables = [name for name in TABLES if _holds_tensors(content.get(name), DEEPEST)]
    if not tables:
        return content
    if {"student", "teacher"} <= set(tables) or len({id(content[name]) for name in tables}) > 1:
        raise ValueError(f"{path}: holds several models ({', '.join(tables)}): save the one that is meant in a file of its own")
    for name in AVERAGES:
        if name in content:
            log.warning("%s: the weights under %r are taken, not their running average under %r", path, tables[0], name)
    return _model(content[tables[0]], path, depth - 1)


def _holds_tensors(content: Any, depth: int) -> bool:
    if isinstance(content, Mapping) and depth:
        return any(_holds_tensors(value, depth - 1) for value in content.values())
    return isinstance(content, Tensor)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    waiting: list[tuple[str, Any, int]] = [("", content, DEEPEST)]
    while waiting:
        prefix, table, depth = waiting.pop()
        if not isinstance(table, Mapping) or not table or depth == 0:
            where = f" under {prefix[:-1]!r}" if prefix else ""
            raise ValueError(
                f"{path}: neither a state_dict nor a table with one under 'state_dict'{where}; save the model's state_dict alone"
            )
        for key, value in table.items():
            if not isinstance(key, str):
                raise ValueError(f"{path}: neither a state_dict nor a table with one: the key {key!r} is no name")
            if isinstance(value, Tensor):
                flat[prefix + key] = value
            else:
                waiting.append((f"{prefix}{key}.", value, depth - 1))
    return flat


def check_values(name: str, tensor: Tensor, origin: str) -> None:
    """Raises ValueError when a tensor of a file has values that no trained model has: a damaged file, or a run that diverged."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    largest = tensor.abs().max()  # NaN where there is one
    if not torch.isfinite(largest):
        raise ValueError(f"{origin}: {name} holds NaN or infinity: the file is damaged, or its training diverged; take another one")
    if largest > LARGEST:
        raise ValueError(f"{origin}: {name} holds a value of {largest.item():.3g}: the file is damaged; copy or download it again")
