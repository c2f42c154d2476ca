"""Labelled images in a folder for each class, as torchvision's ImageFolder reads them: `val/CLASS/*.JPEG`.

A class's number is its place among the sorted names of the class folders. Its name for a model's text tower is, by the first of these that
there is: a line of classnames.txt; open_clip's name of an ImageNet class, where the folders are its WordNet ids, or 0 to 999 as
ImageNet-V2's; the folder's own name.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from timm.data import ImageNetInfo

from megakd.data.samples import IMAGES
from megakd.data.storage import shown
from megakd.evaluation.image_files import FileSet, ImageFile, folder_of
from megakd.evaluation.zero_shot import CLASSES, TEMPLATES, ClassSet, lines_of, templates_of
from megakd.recipe import Data
from megakd.vqa.images import is_shards

log = logging.getLogger("megakd.evaluation")
SUFFIXES = IMAGES | {"ppm", "pgm"}  # those of shards, and torchvision's two others
_NESTED = {"train": ("train",), "test": ("val", "validation", "test")}
_WORDNET = re.compile(r"n\d{8}")


def find(given: str, part: str) -> Path | None:
    """The folder whose subfolders are the classes of the part, train or test: `given`, or one in it; None where there is none.

    A folder with shards of the part, as CLIP_benchmark's, is none. Raises ValueError where two are there, as val/ and test/.
    """
    folder = folder_of(given)
    if is_shards(given):
        return None
    try:
        if not folder.is_dir() or next((folder / part).glob("*.tar"), None) is not None:
            return None
    except OSError:
        return None
    nested = [folder / name for name in _NESTED[part] if _has_classes(folder / name)]
    if len(nested) > 1:
        raise ValueError(f"{given!r} has class folders in {' and in '.join(one.name for one in nested)}: name one of them")
    return nested[0] if nested else folder if _has_classes(folder) else None


def open_classes(root: Path, data: Data) -> tuple[FileSet, list[str]]:
    """The images of a folder that `find` has found, in the order of ImageFolder, and the names of its class folders; what is left out, and
    what is odd, is logged. Raises ValueError for fewer than two classes and for images beside the class folders."""
    classes = sorted(name for name in _listed(root) if (root / name).is_dir())
    if loose := [name for name in _listed(root) if _is_image(name) and (root / name).is_file()]:
        raise ValueError(
            f"{root}: {len(loose)} images lie beside the class folders ({shown(loose[0])}): sort them into a folder of a class"
        )
    if len(classes) < 2:
        raise ValueError(f"{root}: one class folder ({shown(classes[0])}); give the folder whose subfolders are the classes")
    files, others, empty = list[ImageFile](), list[str](), list[str]()
    for label, name in enumerate(classes):
        before = len(files)
        for path in _files(root / name):
            if _is_image(path):
                files.append(ImageFile(os.path.relpath(path, root), label))
            else:
                others.append(path)
        if len(files) == before:
            empty.append(name)
    if others:
        log.warning("%s: %d files are no images by their suffix and are left out: %s", root, len(others), shown(others[0]))
    if empty:
        log.warning("%s: %d class folders hold no image; they stay classes: %s", root, len(empty), ", ".join(map(shown, empty[:3])))
    log.info("%s: %d images of %d classes", root, len(files), len(classes))
    return FileSet.of(root, files, data, listed=True), classes


def class_set(given: str, root: Path, classes: list[str]) -> ClassSet:
    """Names and templates for the class folders, in their order. Raises ValueError for files of names that do not fit, and for folders
    whose names say nothing."""
    wordnet = {name: number for number, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    here = list(dict.fromkeys((root, folder_of(given))))
    named = next((place for place in here if (place / CLASSES).is_file()), None)
    numbers: list[int] | None = None
    if named is not None:
        names, source = lines_of(named / CLASSES, repr(given)), str(named / CLASSES)
        if len(names) != len(classes):
            raise ValueError(
                f"{CLASSES} has {len(names)} lines, and there are {len(classes)} class folders in {root}: it "
                f"needs a name for each, in the sorted order of the folders' names"
            )
    elif all(name in wordnet for name in classes):
        numbers = [wordnet[name] for name in classes]
    elif sorted(classes) == sorted(map(str, range(len(IMAGENET_CLASSNAMES)))):
        numbers = [int(name) for name in classes]
    elif (odd := next((name for name in classes if _WORDNET.fullmatch(name)), None)) is not None:
        raise ValueError(
            f"{odd} is a WordNet id that is none of ImageNet's 1000 classes: put a {CLASSES} beside the class folders, "
            f"a name for each, in the sorted order of the folders' names"
        )
    else:
        names, source = [name.replace("_", " ") for name in classes], "the folders' names"
    if numbers is not None:
        names, source = [IMAGENET_CLASSNAMES[number] for number in numbers], "open_clip's names of ImageNet's classes"
    written = next((place for place in here if (place / TEMPLATES).is_file()), None)
    if written is not None:
        templates, of = templates_of(written / TEMPLATES, repr(given)), str(written / TEMPLATES)
    elif numbers is not None:
        templates, of = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES], "open_clip's 80 of ImageNet"
    else:
        templates, of = [template("{c}") for template in SIMPLE_IMAGENET_TEMPLATES], "open_clip's 7 simple ones"
    log.warning("classes are the folders of %s; their names: %s (%s, ...); templates: %s", root, source, ", ".join(names[:2]), of)
    return ClassSet(names, templates, f"names: {source}; templates: {of}")


def _has_classes(folder: Path) -> bool:
    """Whether a subfolder holds an image, at any depth."""
    return folder.is_dir() and any(_is_image(path) for name in sorted(_listed(folder)) for path in _files(folder / name))


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({error.strerror}): check its permissions") from error


def _files(folder: Path) -> Iterator[str]:
    """The files below it at any depth, links followed, in ImageFolder's order. Raises ValueError for a link to a folder above it, by which
    ImageFolder finds each image forty times."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        for link in (path for name in folders if os.path.islink(path := os.path.join(parent, name))):
            if Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(link)):
                raise ValueError(f"{link}: a link to a folder that it lies in; take it out")
        found.append((parent, names))
    for parent, names in sorted(found):
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def _is_image(path: str) -> bool:
    return path.rpartition(".")[2].lower() in SUFFIXES
