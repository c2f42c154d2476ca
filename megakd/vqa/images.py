"""Where the images of questions lie: files of a folder, or samples of image-text shards found by their key."""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megakd.data.bad_samples import BadSample
from megakd.data.shards import Sample, ShardSet
from megakd.data.storage import local_path
from megakd.vqa.json_files import shown, some

_SHOWN = 3
_TAR = re.compile(r"\.tar(?![\w./-])")  # at the end of a part, of a word in braces, or of the path of a signed URL
_KEY_BYTES = 64  # of a long key, an index keeps the end

ImageBytes = tuple[str, bytes] | BadSample  # (where, the image's bytes)


class MissingImages(ValueError):
    """Images of questions that are not there. there: some names that are."""

    def __init__(self, missing: Sequence[str], where: str, there: Sequence[str]) -> None:
        super().__init__(f"images = {where!r} lacks {len(missing)} images that are named ({some(missing)})")
        self.there = there


class Images(Protocol):
    """Images by their names in questions."""

    def read(self, names: Sequence[str]) -> Iterator[ImageBytes]:
        """One result for each name, in order; a BadSample for an image that cannot be read."""


class ImageFolder:
    """Image files below one folder, which names from the questions' file may not leave."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """Raises ValueError for a folder that is not there, for names that leave it, and when files are missing."""
        try:
            is_folder = folder.is_dir()
        except OSError as error:  # a name that is too long
            raise ValueError(f"images = {shown(str(folder))} cannot be read: {error.strerror}") from error
        if not is_folder:
            raise ValueError(f"images = {str(folder)!r} is no folder: give the folder of the images, or shards (*.tar)")
        self.folder = folder
        below: dict[str, set[str]] = {}
        missing = []
        for name in dict.fromkeys(names):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(
                    f"image {shown(name)} would be read from outside images = {str(folder)!r}: correct it in the file that names it"
                )
            if (parent := str(path.parent)) not in below:  # listed, as a stat for each file takes minutes on a network disk
                below[parent] = _listed(folder / parent)
            if path.name not in below[parent]:
                missing.append(name)
        if missing:
            there = (str(path.relative_to(folder)) for path in _files(folder))
            raise MissingImages(missing, str(folder), list(itertools.islice(there, _SHOWN)))

    def read(self, names: Sequence[str]) -> Iterator[ImageBytes]:
        for name in names:
            path = self.folder / name
            try:
                yield str(path), path.read_bytes()
            except FileNotFoundError:
                yield BadSample("missing_image", "gone since the run began", str(path))
            except OSError as error:
                yield BadSample("read_error", str(error), str(path))


class ImageShards:
    """The images of tar shards, by webdataset's key: the name up to the first dot of its last part."""

    def __init__(self, shards: ShardSet, names: Iterable[str], where: str) -> None:
        """Raises ValueError when keys are missing, and for one of several samples."""
        self.shards = shards
        self._keys, self._sample_of_key = _samples(shards, list(dict.fromkeys(names)), where)

    def read(self, names: Sequence[str]) -> Iterator[ImageBytes]:
        places = np.searchsorted(self._keys, _wanted(names))
        for sample in self.shards.read_each(self._sample_of_key[places].tolist(), ("image",)):
            yield (sample.where, sample.members["image"]) if isinstance(sample, Sample) else sample


def is_shards(images: str) -> bool:
    """Whether it names tars, or a pattern of them; a folder may have any name."""
    return not os.path.isdir(local_path(images)) and _TAR.search(images) is not None


def _files(folder: Path) -> Iterator[Path]:
    """Some files below it, for an error."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in sorted(names)[:_SHOWN])


def _listed(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return set()
        raise ValueError(f"{folder}: cannot be read ({error.strerror}): check its permissions") from error


def shard_key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".")[0]


def _wanted(names: Sequence[str]) -> NDArray[np.bytes_]:
    """(names,): their keys as an index has them."""
    return np.array([shard_key(name).encode("utf-8", "surrogateescape")[-_KEY_BYTES:] for name in names], dtype=f"S{_KEY_BYTES}")


def _samples(shards: ShardSet, names: list[str], where: str) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """The names' keys, sorted, each once, and the sample of each.

    As arrays: a dict of millions takes gigabytes, and a forked worker copies what it looks up in one.
    """
    keys = np.concatenate([shards.keys(number).astype(f"S{_KEY_BYTES}") for number in range(len(shards.names))])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    wanted = _wanted(names)
    left, right = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
    if missing := [names[place] for place in np.flatnonzero(left == right)]:
        raise MissingImages(missing, where, [key.decode("utf-8", "replace") for key in keys[:_SHOWN].tolist()])
    distinct, first = np.unique(wanted, return_index=True)
    if len(distinct) < len({shard_key(name) for name in names}):
        raise ValueError(f"images = {where!r}: several names have the same last {_KEY_BYTES} bytes, of which an index keeps no more")
    if several := np.flatnonzero(right - left > 1).tolist():
        example = names[several[0]]
        raise ValueError(
            f"images = {where!r}: the key of {example!r} is in the shards {right[several[0]] - left[several[0]]} times: name one set"
        )
    return distinct, order[left][first]
