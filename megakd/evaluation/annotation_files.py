"""Files that say what belongs to the images of a folder: captions (Karpathy's splits, COCO's) and hard negatives (SugarCrepe's, ARO's).

A file's layout is told by its keys; one of another layout is refused with those that are read. Sources are the projects' own readers:
RAIVNLab/sugar-crepe (main_eval.py), mertyg/vision-language-models-are-bows (dataset_zoo/aro_datasets.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megakd.evaluation.image_files import FileSet, ImageFile, folder_of, one_line
from megakd.recipe import Data
from megakd.recipe.evaluation import CaptionFiles, NegativeFiles
from megakd.vqa.json_files import Misfit, is_id, items, object_of, read_any, shown, some, strings, text_of

log = logging.getLogger("megakd.evaluation")
_CAPTIONS = (
    'Karpathy\'s {"images": [{"filename", "split", "sentences": [{"raw"}]}]} and COCO\'s captions {"images": [{"id", "file_name"}], '
    '"annotations": [{"image_id", "caption"}]}'
)
_NEGATIVES = (
    'SugarCrepe\'s {ID: {"filename", "caption", "negative_caption"}}, ARO\'s [{"image_path", "true_caption", "false_caption", "bbox_x", '
    '"bbox_y", "bbox_w", "bbox_h", "relation_name" or "attributes"}] and the test cases of its orders [{"image", "caption_options": '
    "[TRUE, FALSE, ...]}]"
)
_SPLIT = "test"  # of Karpathy's, where the recipe names none
_BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
_LARGEST = 10**6  # pixels of a side of a box
_FEWEST = 25  # pairs of an attribute that ARO reports


def captioned(source: CaptionFiles, data: Data) -> FileSet:
    """The images of a retrieval set with their captions. Raises ValueError for a file of another layout, a split without images, and
    images that are not in the folder."""
    path, folder = folder_of(source.annotations), folder_of(source.images)
    value = read_any(path)
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        raise _misfit(path, "annotations", _CAPTIONS, value)
    try:
        if "annotations" in value:
            files = _coco(value, source, path)
        else:
            files = _karpathy(value["images"], source, path, folder)
    except ValueError as error:
        raise ValueError(f"{error}; the layouts that are read: {_CAPTIONS}") from error
    return FileSet.of(folder, files, data)


def _karpathy(images: list[Any], source: CaptionFiles, path: Path, folder: Path) -> list[ImageFile]:
    split, files, splits = source.split or _SPLIT, list[ImageFile](), dict[str, int]()
    below: bool | None = None
    for number, image in enumerate(images):
        where = f"{path}: image {number}"
        entry = object_of(image, where)
        own = text_of(entry, "split", where)
        splits[own] = splits.get(own, 0) + 1
        if own != split:
            continue
        name = text_of(entry, "filename", where)
        longer = f"{entry['filepath']}/{name}" if isinstance(entry.get("filepath"), str) and entry["filepath"] else name
        if below is None:  # COCO's lie in val2014 below the folder, or the folder is val2014 itself
            below = os.path.exists(folder / longer) or not os.path.exists(folder / name)
        sentences = [object_of(one, f"{where}, a sentence") for one in items(entry, "sentences", where)]
        files.append(ImageFile(longer if below else name, texts=_texts([text_of(one, "raw", where) for one in sentences], where)))
    if not files:
        there = ", ".join(f"{name} ({count} images)" for name, count in splits.items())
        raise ValueError(f"{path} has no image of split = {split!r}; it has {there or 'none at all'}")
    return files


def _coco(value: Mapping[str, Any], source: CaptionFiles, path: Path) -> list[ImageFile]:
    if source.split is not None:
        raise ValueError(f"split = {source.split!r}: {path} is COCO's captions, one split a file: take split out")
    names, texts = dict[Any, str](), dict[Any, list[str]]()
    for number, image in enumerate(value["images"]):
        where = f"{path}: image {number}"
        entry = object_of(image, where)
        if not is_id(entry.get("id")) or entry["id"] in names:
            raise ValueError(f'{where} has "id" = {shown(entry.get("id"))}: a number or a text that no other image has')
        names[entry["id"]] = text_of(entry, "file_name", where)
    for number, annotation in enumerate(items(value, "annotations", str(path))):
        where = f"{path}: annotation {number}"
        entry = object_of(annotation, where)
        if not is_id(of := entry.get("image_id")) or of not in names:
            raise ValueError(f'{where} has "image_id" = {shown(of)}, which is no image of the file')
        texts.setdefault(of, []).append(text_of(entry, "caption", where))
    if without := [names[one] for one in names if one not in texts]:
        log.warning("%s: %d of %d images have no caption and are left out: %s", path, len(without), len(names), some(without))
    return [ImageFile(name, texts=_texts(texts[one], name)) for one, name in names.items() if one in texts]


def _texts(captions: Sequence[str], where: str) -> tuple[str, ...]:
    if not captions:
        raise ValueError(f"{where} has no caption")
    return tuple(one_line(text) for text in captions)


def with_negatives(source: NegativeFiles, data: Data) -> tuple[FileSet, int]:
    """Images, each with a true caption and the false ones of one kind; and how many pairs a kind needs to count in the mean of kinds.

    A kind is a file's name (SugarCrepe's, orders), a relation or a pair of attributes (ARO's, whose images are cut to their box). Raises
    ValueError for a file of another layout and images that are not in the folder.
    """
    files, fewest = list[ImageFile](), 1
    for path in _json_files(source.annotations):
        value = read_any(path)
        entries = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise _misfit(path, "annotations", _NEGATIVES, value)
        keys = set(entries[0])
        try:
            if {"filename", "caption", "negative_caption"} <= keys:
                files += _pairs(entries, path)
            elif {"image_path", "true_caption", "false_caption", *_BOX} <= keys and keys & {"relation_name", "attributes"}:
                files += _boxes(entries, path, data.max_pixels)
                fewest = _FEWEST if "attributes" in keys else fewest
            elif {"image", "caption_options"} <= keys:
                files += _orders(entries, path)
            else:
                raise _misfit(path, "annotations", _NEGATIVES, value)
        except Misfit:
            raise
        except ValueError as error:
            raise ValueError(f"{error}; the layouts that are read: {_NEGATIVES}") from error
    return FileSet.of(folder_of(source.images), files, data), fewest


def _pairs(entries: list[Mapping[str, Any]], path: Path) -> Iterator[ImageFile]:
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        yield ImageFile(
            text_of(entry, "filename", where),
            texts=(_said(entry, "caption", where),),
            negatives={path.stem: _said(entry, "negative_caption", where)},
        )


def _boxes(entries: list[Mapping[str, Any]], path: Path, most_pixels: int) -> Iterator[ImageFile]:
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        left, upper, width, height = (entry.get(key) for key in _BOX)
        sides = (left, upper, width, height)
        whole = all(isinstance(side, int) and not isinstance(side, bool) and abs(side) <= _LARGEST for side in sides)
        if not whole or not (width > 0 and height > 0 and width * height <= most_pixels):  # type: ignore[operator]
            raise ValueError(
                f"{where} has the box {shown(sides)}: four whole numbers of pixels, the last two above 0, of data.max_pixels at most"
            )
        if "relation_name" in entry:
            kind = _said(entry, "relation_name", where)
        elif not (both := strings(entry, "attributes", where)):
            raise ValueError(f"{where} has no attributes")
        else:
            kind = "_".join(both)
        yield ImageFile(
            text_of(entry, "image_path", where),
            texts=(_said(entry, "true_caption", where),),
            negatives={kind: _said(entry, "false_caption", where)},
            box=(left, upper, left + width, upper + height),  # type: ignore[operator, arg-type]
        )


def _orders(entries: list[Mapping[str, Any]], path: Path) -> Iterator[ImageFile]:
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number}"
        options = items(entry, "caption_options", where)
        if len(options) < 2 or not all(isinstance(text, str) and text.strip() for text in options):
            raise ValueError(f"{where} has caption_options = {shown(options)}: the true caption, then at least one false one")
        true, *false = map(one_line, options)
        yield ImageFile(text_of(entry, "image", where), texts=(true,), negatives={path.stem: false})


def _said(entry: Mapping[str, Any], key: str, where: str) -> str:
    """The caption under `key`, which says something."""
    if not (text := one_line(text_of(entry, key, where))):
        raise ValueError(f'{where}: "{key}" is blank')
    return text


def _json_files(given: str | list[str]) -> list[Path]:
    """The files that are named, of a folder all its .json. Raises ValueError for one that is named twice and for a folder without."""
    paths: list[Path] = []
    for path in map(folder_of, [given] if isinstance(given, str) else given):
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"annotations = {str(path)!r}: a folder without .json files")
        paths += found
    stems = [path.stem for path in paths]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise ValueError(f"annotations: two files are named {twice}.json, which names the kind of their negatives; rename one")
    return paths


def _misfit(path: Path, key: str, layouts: str, value: Any) -> Misfit:
    keys = value if isinstance(value, dict) else value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else None
    there = f"it is a {type(value).__name__}" if keys is None else f"it has {some(list(keys))}"
    return Misfit(path, f"is of no layout that {key} may have ({there}): {layouts}", value)
