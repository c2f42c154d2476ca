"""Files and folders that are there whole or not at all, whatever is killed and however full the disk is.

While it is written, `NAME` is `.NAME.*partial` beside its place; a folder that is being replaced is `.NAME.replaced`, one that is being
deleted `.NAME.removed`. Who holds a folder calls `clear` at its start, which removes what a kill left under these names.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megakd.runtime.console import LongWork

PARTIAL, REMOVED, REPLACED = ".partial", ".removed", ".replaced"
_HASHED = 1 << 22  # bytes at a time
# What versions before 0.2 had under way.
_FORMERLY = (".partial_*", ".removed_*", "metrics.partial")


def users_cache() -> Path | None:
    """The folder of caches of who runs this: $XDG_CACHE_HOME or ~/.cache; None for a user without a home, whose "~" is no folder.

    Relative ones are ignored, as the XDG base directory specification has it: each working directory would have its own.
    """
    folders = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    return next((Path(folder) for folder in folders if os.path.isabs(folder)), None)


def check_place(folder: Path, option: str) -> None:
    """Raise ValueError naming `option` where `folder` is not there and cannot be made, or cannot be written to. Leaves nothing behind."""
    try:
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists() or parent.is_symlink())
        if not there.is_dir():
            raise ValueError(f"{option} {folder}: {there} is no folder; choose another {option}")
        # under a name that `clear` removes; ignore_errors, as another job's start may do so now
        shutil.rmtree(tempfile.mkdtemp(prefix=".tried-", suffix=PARTIAL, dir=there), ignore_errors=True)
        for part in folder.absolute().relative_to(there.absolute()).parts:
            if len(os.fsencode(part)) > 255:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        shown = str(folder) if len(str(folder)) < 300 else f"{str(folder)[:300]}..."
        raise ValueError(f"{option} {shown}: cannot be written to ({error.strerror or error}); choose another {option}") from None


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk. Raises OSError when they cannot be written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file, LongWork("checksum of a file", os.fstat(file.fileno()).st_size, "bytes") as work:
        while piece := file.read(_HASHED):
            digest.update(piece)
            work.advance(len(piece))
    return digest.hexdigest()


def json_sha256(content: Any) -> str:
    """Of plain JSON, whatever the order of its keys; a file holds it, so that a changed value is noticed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def atomic_file(target: Path, *, alone: bool = False) -> Iterator[Path]:
    """A path beside `target` to write to; it takes target's place on success and is removed on failure.

    alone: one process at a time writes this file, always under the same partial name.
    """
    name = target.with_name(f".{target.name}{PARTIAL}")
    if not alone:
        handle, random = tempfile.mkstemp(prefix=_prefix(target), suffix=PARTIAL, dir=target.parent)
        os.close(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(random, 0o666 & ~umask)  # mkstemp gives 0600, but such files are shared with other users of the data
        name = Path(random)
    try:
        yield name
        os.replace(name, target)
    except BaseException:
        if not alone:
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise


def partials(target: Path) -> list[Path]:
    """What writers by `atomic_file`, dead or alive, have beside `target`."""
    return sorted(target.parent.glob(f"{glob.escape(_prefix(target))}*{PARTIAL}"))


def _prefix(target: Path) -> str:
    return f".{target.name[:80]}."


def write_text(target: Path, text: str) -> None:
    """Write a file, one process at a time: a reader sees the old text or the new one, also after a power cut."""
    with atomic_file(target, alone=True) as partial:
        partial.write_text(text, encoding="utf-8")
        sync(partial)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, for one writer; synced, it takes target's place on success, and is removed on failure."""
    partial, replaced = _beside(target, PARTIAL), _beside(target, REPLACED)
    try:
        _settle(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            _settle(target)
        raise
    if replaced.exists():
        remove(replaced)


def remove(folder: Path) -> None:
    """Remove a folder; a crash halfway does not leave it under its name."""
    if folder.exists():
        doomed = _beside(folder, REMOVED)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def clear(*folders: Path) -> list[Path]:
    """Remove what killed writers left directly in these folders, and put back what one was about to replace. Returns what was there.

    Nobody else may be writing there. A folder may be missing.
    """
    cleared: list[Path] = []
    for folder in folders:
        for kept in sorted(folder.glob(f".*{REPLACED}")):
            _settle(kept.with_name(kept.name[1 : -len(REPLACED)]))
            cleared.append(kept)
        for pattern in (f".*{PARTIAL}", f".*{REMOVED}", *_FORMERLY):
            for path in sorted(folder.glob(pattern)):
                if path.is_symlink():  # not ours
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
                cleared.append(path)
    return cleared


def _settle(target: Path) -> None:
    """Put back what was being replaced; remove it where its successor is in place."""
    replaced = _beside(target, REPLACED)
    if replaced.exists():
        if target.exists():
            remove(replaced)
        else:
            replaced.rename(target)


def _beside(path: Path, end: str) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}{end}")


def safetensors_header(file: BinaryIO, largest: int = 1 << 27) -> tuple[int, dict[str, Any]]:
    """(where the tensors' bytes begin, {name: {"dtype", "shape", "data_offsets"}, "__metadata__": ...}) of a safetensors file at its start.

    Offsets count from where the bytes begin. largest: bytes that are read of a header, whose damaged length may be gigabytes. Raises
    ValueError where there is no JSON; nothing is compared with the file's length.
    """
    (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    header: dict[str, Any] = json.loads(file.read(min(length, largest)))
    return 8 + length, header
