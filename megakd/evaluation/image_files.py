"""Evaluation sets whose images are files of a folder: read by index as `ShardSet` is, so that they are scored by the same code.

`class_folders` and `annotation_files` find out what belongs to each image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megakd.data.bad_samples import BadCounter, BadSample
from megakd.data.samples import Slot
from megakd.data.shards import Sample
from megakd.data.storage import local_path
from megakd.recipe import Data
from megakd.vqa.images import ImageFolder, MissingImages
from megakd.vqa.json_files import some


class ImageFile(NamedTuple):
    """An image by its name below the folder, with what is known of it. texts: the caption's lines.

    negatives: false captions by kind. box: (left, upper, right, lower) in pixels, all of the image that is shown.
    """

    image: str
    label: int | None = None
    texts: tuple[str, ...] | None = None
    negatives: dict[str, str | list[str]] | None = None
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class FileSet:
    """Image files with labels or captions, by index; the interface of `data.evaluation.SampleSet`.

    The rows are one block of JSON with offsets: as Python objects those of a training set of a million images take a gigabyte in each
    worker.
    """

    images: ImageFolder
    data: Data
    packed: bytes
    ends: NDArray[np.int64]  # (len,), the end of each row in `packed`
    known_bad: BadCounter = field(default_factory=BadCounter)  # nothing is known before an image is read: each file has a row

    @classmethod
    def of(cls, folder: Path, files: Iterable[ImageFile], data: Data, *, listed: bool = False) -> FileSet:
        """listed: the names were found in the folder; others are looked for. Raises ValueError for a folder or images that are missing."""
        rows = list(files)
        names = () if listed else (row.image for row in rows)
        try:
            images = ImageFolder(folder, names)
        except MissingImages as error:
            there = f"; there are {some(error.there)} in that folder" if error.there else "; the folder is empty"
            raise ValueError(f"{error}: complete it, or give the folder that their names begin in{there}") from error
        packed = [json.dumps(row, separators=(",", ":")).encode() for row in rows]
        return cls(images, data, b"".join(packed), np.cumsum([len(row) for row in packed], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def where(self, index: int) -> str:
        """The image's path, for messages."""
        return str(self.images.folder / self._row(index).image)

    def read(self, index: int, needs: tuple[Slot, ...]) -> Sample:
        """What `needs` names of image `index`, as `ShardSet.read` gives it. Raises BadSample when its file cannot be read."""
        (sample,) = self.read_each([index], needs)
        if isinstance(sample, BadSample):
            raise sample
        return sample

    def read_each(self, indices: Sequence[int], needs: tuple[Slot, ...]) -> Iterator[Sample | BadSample]:
        """read() of each, in order; a bad sample is yielded, not raised."""
        for index in indices:
            row = self._row(index)
            where, members = str(self.images.folder / row.image), dict[Slot, bytes]()
            if row.label is not None:
                members["cls"] = b"%d" % row.label
            if row.texts is not None:
                members["caption"] = "\n".join(row.texts).encode()
            if row.negatives is not None:
                members["json"] = json.dumps({"negatives": row.negatives}).encode()
            if "image" in needs:
                (image,) = self.images.read([row.image])
                if isinstance(image, BadSample):
                    yield image
                    continue
                where, members["image"] = image
            yield Sample(where, {slot: members[slot] for slot in needs if slot in members}, row.box)

    def _row(self, index: int) -> ImageFile:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = int(self.ends[index - 1]) if index else 0
        image, label, texts, negatives, box = json.loads(self.packed[start : int(self.ends[index])])
        return ImageFile(image, label, texts, negatives, None if box is None else tuple(box))


def folder_of(given: str) -> Path:
    """The folder that a recipe names."""
    return Path(local_path(given))


def one_line(text: Any) -> str:
    """A caption as one line: a line break in it would begin another caption."""
    return " ".join(str(text).split())
