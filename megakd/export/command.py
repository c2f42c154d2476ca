"""`megakd export`: a model written in a format of the field, read back by that format's own library and compared, then put in its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megakd.export import clip_folder, onnx_files
from megakd.export.options import Options
from megakd.export.source import Source
from megakd.runtime import files

# What is known of an export, and the mark by which a later one may take its place.
RECORD = "export.json"
# Writes into an empty folder, compares what the format's library reads there, and gives lines for people. Raises ValueError to refuse.
Writer = Callable[[Source, Path, Options], list[str]]


def _open_clip(source: Source, folder: Path, options: Options) -> list[str]:
    clip_folder.fill(folder, source.weights, source.built)
    return ["open_clip loads it, and tokens, embeddings and scale are the model's own"]


def _onnx(source: Source, folder: Path, options: Options) -> list[str]:
    return onnx_files.write(source.built, folder, onnx_files.chosen(options.precision))


FORMATS: dict[str, Writer] = {"open_clip": _open_clip, "onnx": _onnx}


def check_options(to: str, options: Options) -> None:
    """Raises ValueError for an option that the format has no use for, or of a value that it has not, before anything is loaded."""
    if options.precision and to != "onnx":
        raise ValueError(f"--precision {options.precision[0]}: is of --to onnx, and {to} is written in float32; take it out")
    onnx_files.chosen(options.precision)


def check_out(out: Path) -> None:
    """Raises ValueError where a folder cannot be written, or holds anything that no earlier export has put there."""
    files.check_place(out.absolute().parent, "--out")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out}: a file; give a folder")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if foreign := sorted(found - {*_written(out / RECORD), RECORD}):
        raise ValueError(f"--out {out}: holds other things than an earlier export ({foreign[0]}); choose another folder, or empty this one")


def _written(record: Path) -> list[str]:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        return [str(name) for name in content["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def export(source: Source, to: str, out: Path, options: Options) -> list[str]:
    """Write `source` to `out` as the format `to`, in the place of an earlier export. Gives lines for people.

    Raises ValueError where the format cannot hold the model, where its library reads another one than was written, and where the disk
    has no room; nothing is left of `out` then but what was there.
    """
    check_out(out)
    with files.atomic_folder(out) as partial:
        lines = FORMATS[to](source, partial, options)
        written: dict[str, Any] = {
            path.relative_to(partial).as_posix(): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
        }
        (partial / RECORD).write_text(json.dumps({"format": to, "source": source.name, "files": written}, indent=1), encoding="utf-8")
    return lines
