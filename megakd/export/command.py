"""`megakd export`: a model written in a format of the field, read back by that format's own library and compared, then put in its place."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.export import card, clip_folder, head_weights, hub, llava_folder, onnx_files, transformers_folder
from megakd.export.options import Options
from megakd.export.source import Source
from megakd.recipe import texts
from megakd.runtime import files
from megakd.version import __version__

STORAGE = "make room there, or choose another --out"
# What is known of an export, and the mark by which a later one may take its place.
RECORD = "export.json"


@dataclass(frozen=True)
class Format:
    """One of `--to`. library: that reads it, as the hub calls it.

    write: into an empty folder, compares what the library reads there with the model, and gives lines for people; raises ValueError to
    refuse. use: of the finished folder and the name that a user loads it by, Python for the model card.
    of_bundles: whether it takes a decoder's bundle, not a pair of towers.
    """

    library: str
    write: Callable[[Source, Path, Options], list[str]]
    use: Callable[[Path, str], str]
    of_bundles: bool = False


def _open_clip(source: Source, folder: Path, options: Options) -> list[str]:
    if options.part != "both":
        raise ValueError(f"--part {options.part}: open_clip's folders hold both towers; take it out, or give another --to")
    if not source.built.description.has_text:
        raise ValueError(f"--to open_clip: {source.name} has no text tower, and open_clip's folders hold both; take --to onnx")
    clip_folder.fill(folder, source.weights, source.built)
    return ["open_clip loads it, and tokens, embeddings and scale are the model's own"]


def _use_open_clip(folder: Path, name: str) -> str:
    where = f"hf-hub:{name}" if name != FOLDER else f"local-dir:{name}"
    return f"""
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("{where}")
tokenizer = open_clip.get_tokenizer("{where}")
"""


def _transformers(source: Source, folder: Path, options: Options) -> list[str]:
    return transformers_folder.fill(folder, source.built, options)


def _onnx(source: Source, folder: Path, options: Options) -> list[str]:
    return onnx_files.write(source.built, folder, onnx_files.chosen(options.precision), texts=options.part == "both")


def _llava(source: Source, folder: Path, options: Options) -> list[str]:
    assert source.bundle is not None
    if options.part != "both":
        raise ValueError(f"--part {options.part}: LLaVA's folder holds tower and language model; take it out")
    return llava_folder.write(source.bundle, folder)


FOLDER = "FOLDER"  # in a card of what was not pushed
FORMATS: dict[str, Format] = {
    "open_clip": Format("open_clip", _open_clip, _use_open_clip),
    "transformers": Format("transformers", _transformers, transformers_folder.use),
    "onnx": Format("onnx", _onnx, onnx_files.use),
    "llava": Format("transformers", _llava, llava_folder.use, of_bundles=True),
}
PARTS = ("both", "image")


def check(to: str, options: Options) -> None:
    """Raises ValueError for an option that the format has no use for, or of a value that it has not, before anything is loaded."""
    if to not in FORMATS:
        raise ValueError(f"--to {to}: {texts.did_you_mean(to, FORMATS)}one of {', '.join(FORMATS)}")
    if options.part not in PARTS:
        raise ValueError(f"--part {options.part}: {texts.did_you_mean(options.part, PARTS)}one of {', '.join(PARTS)}")
    if options.precision and to != "onnx":
        raise ValueError(f"--precision {options.precision[0]}: is of --to onnx, and {to} is written in float32; take it out")
    onnx_files.chosen(options.precision)
    if options.dry_run and options.push is None:
        raise ValueError("--dry_run: goes with --push ORG/NAME, which it does not send")
    card.check_licence(options.license)
    if options.push is not None:
        hub.check_name(options.push)


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
    _check_room(source, out)
    described, writer = source.built.description, FORMATS[to]
    pipeline = "zero-shot-image-classification" if described.has_text and options.part == "both" else "image-feature-extraction"
    if source.bundle is not None:
        pipeline = "image-text-to-text"
    with _full_disk(out), files.atomic_folder(out) as partial:
        checked = writer.write(source, partial, options)
        if options.keep_projection:
            checked += head_weights.lines(source.recipe, source.weights, partial)
        title, use = (options.push or out.name), writer.use(partial, options.push or FOLDER)
        content, missing = card.text(title, source, writer.library, pipeline, options.license, use, checked)
        (partial / card.CARD).write_text(content, encoding="utf-8")
        written: dict[str, Any] = {
            path.relative_to(partial).as_posix(): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
        }
        record = {"format": to, "source": source.name, "megakd": __version__, "files": written}
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _readable_by_all(partial)
    return [*checked, *missing]


def push(out: Path, options: Options) -> list[str]:
    """Lines for people of what `--push` asks for, nothing without it. Raises ValueError, and the folder stays, where the hub refuses."""
    if options.push is None:
        return []
    return hub.listed(out, options.push) if options.dry_run else [hub.push(out, options.push)]


def _check_room(source: Source, out: Path) -> None:
    """Raises ValueError where the disk cannot hold the model's weights in float32, which every format writes at least once."""
    needed = 4 * sum(value.numel() for value in source.built.clip.state_dict().values())
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise ValueError(f"--out {out}: {needed / 1e6:,.1f} MB of weights, and {free / 1e6:,.1f} MB are free there; {STORAGE}")


@contextlib.contextmanager
def _full_disk(out: Path) -> Iterator[None]:
    """One message for what libraries raise where a disk is full: safetensors and tokenizers have classes of their own for it."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or "No space left" in str(error) or "os error 28" in str(error):
            raise ValueError(f"--out {out}: the disk is full, and nothing of the export is left there; {STORAGE}") from error
        raise


def _readable_by_all(folder: Path) -> None:
    """Files and folders with the rights that new ones get: safetensors writes weights for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
