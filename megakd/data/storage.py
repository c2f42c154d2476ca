"""Bytes of shards, local or remote: stat, ranged reads with bounded retries, whole copies in a cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import stat as stat_module
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from filelock import FileLock

from megakd.recipe.credentials import redact, unsigned
from megakd.runtime.files import atomic_file

T = TypeVar("T")

# Five attempts wait 0.1 + 0.2 + 0.4 + 0.8 s at most: long enough for a throttled bucket, and a dead one ends the run within minutes.
ATTEMPTS = 5
FIRST_DELAY = 0.1
# Below the usual limit of 1024 open files, which torch's shared tensors need as well.
OPEN_FILES = 256
_STAT_THREADS = 32
_STAMP = (1 << 63) - 1
INDEX = ".index.npy"  # suffix of a shard's index
SET_INDEX = ".set-index.json"  # and of the file with what the indexes of a whole set tell
# Errors that another attempt cannot change.
_PERMANENT = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, ImportError, TypeError, ValueError),
)


@dataclass(frozen=True)
class Stat:
    """What tells a shard from an earlier one of its name: size in bytes and a 63-bit stamp of its mtime or etag."""

    size: int
    stamp: int


def shown(name: str | os.PathLike[str]) -> str:
    """A shard's name in a message: without credentials; line breaks, terminal escapes and bytes that are no text escaped."""
    text = redact(str(name))
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def is_remote(name: str) -> bool:
    return "://" in name and not name.startswith(("file://", "local://"))


def local_path(name: str) -> str:
    return os.path.expanduser(re.sub(r"^(file|local)://", "", name))


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it). fsspec keeps one instance a process, and makes a new one after a fork."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from error
    return fs, path


def retry(call: Callable[[], T], what: str) -> T:
    """call(), tried up to ATTEMPTS times with exponential backoff; the last failure is raised as OSError naming `what`."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except _PERMANENT:
            raise
        except Exception as error:
            # fsspec's backends raise their libraries' own types (aiohttp, botocore, google)
            if attempt + 1 == ATTEMPTS:
                raise OSError(f"{what}: failed {ATTEMPTS} times, last with {type(error).__name__}: {error}") from error
            time.sleep(FIRST_DELAY * 2**attempt * random.uniform(0.5, 1.0))  # jitter: ranks must not knock all at once
    raise AssertionError("unreachable")


def stat(name: str) -> Stat | None:
    """Size and stamp, or None where there is no such file."""
    if not is_remote(name):
        try:
            status = os.stat(local_path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:  # no right to look, a name that is too long or holds a NUL
            raise ValueError(f"{shown(name)} cannot be looked at ({error}): check the path and its permissions") from error
        if not stat_module.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise ValueError(f"{shown(name)} is no file but a folder, a pipe or a device: give .tar files")
        return Stat(status.st_size, status.st_mtime_ns & _STAMP)  # a date before 1970 is negative
    fs, path = filesystem(name)
    try:
        info = retry(lambda: fs.info(path), name)
    except FileNotFoundError:
        return None
    if info.get("size") is None:
        raise ValueError(f"{name}: the server does not tell its size, so ranges of it cannot be read; download it first")
    keys = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
    stamp = next((str(info[key]) for key in keys if info.get(key)), "")
    return Stat(int(info["size"]), int.from_bytes(hashlib.sha256(stamp.encode()).digest()[:8], "little") >> 1 if stamp else 0)


def stat_all(names: list[str]) -> list[Stat | None]:
    """stat() of each; remote ones many at a time, as ten thousand round trips one by one take minutes."""
    if not any(is_remote(name) for name in names):
        return [stat(name) for name in names]
    with ThreadPoolExecutor(min(_STAT_THREADS, len(names))) as pool:
        return list(pool.map(stat, names))


def file_label(name: str, more: str = "") -> str:
    """A file name for what is kept about `name`, unique by digest: without credentials, and the same for a URL that is signed anew."""
    name = unsigned(name)
    digest = hashlib.sha256(f"{name}\0{more}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', name.split('?')[0].rsplit('/', 1)[-1])[-80:]}"


def mirror(url: str, known: Stat, folder: str) -> str:
    """The path of a local copy of a remote shard, downloaded by the first process that needs it; a changed shard's has another name.

    Raises OSError when the download fails or is incomplete.
    """
    shards = Path(local_path(folder)) / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    target = shards / file_label(url, f"{known.size}-{known.stamp}")
    if target.exists():
        return str(target)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            fs, path = filesystem(url)
            with atomic_file(target) as partial:

                def download() -> None:
                    fs.get_file(path, str(partial))
                    if partial.stat().st_size != known.size:
                        raise OSError(f"{partial.stat().st_size} bytes arrived of {known.size}")

                retry(download, url)
    return str(target)


class Reader:
    """Ranged reads: os.pread on a few files kept open, or fsspec. Usable after a fork and after pickling."""

    def __init__(self, cache: str | None) -> None:
        self._cache = cache
        self._files: OrderedDict[str, int] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_cache": self._cache, "_files": OrderedDict(), "_pid": -1}

    def __del__(self) -> None:
        if self._pid == os.getpid():
            self.close()

    def close(self) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def is_slow(self, name: str) -> bool:
        """Whether every read is a round trip over a network, so that many are made at a time."""
        return is_remote(name) and self._cache is None

    def read(self, name: str, known: Stat, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer at the file's end. Raises FileNotFoundError, or OSError after the last retry."""
        if self.is_slow(name):
            fs, path = filesystem(name)
            data: bytes = retry(lambda: fs.cat_file(path, start=offset, end=offset + size), name)
            return data
        path = mirror(name, known, self._cache) if is_remote(name) and self._cache else local_path(name)
        try:
            return os.pread(self._open(path), size, offset)
        except FileNotFoundError:
            raise
        except OSError:  # opening the file anew cures a stale NFS handle
            if (handle := self._files.pop(path, None)) is not None:
                with contextlib.suppress(OSError):
                    os.close(handle)
            return os.pread(self._open(path), size, offset)

    def _open(self, path: str) -> int:
        if self._pid != os.getpid():  # the parent may close its descriptors at any time
            self._files, self._pid = OrderedDict(), os.getpid()
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        while len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]
