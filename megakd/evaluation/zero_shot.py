"""Zero-shot classification: an image belongs to the class whose sentences are nearest, averaged over templates."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megakd.evaluation.encoder import Encoder
from megakd.runtime.console import with_progress

# Legend: n images, C classes, T templates, D embedding width.

# Control characters, line and paragraph separators: other programs end a line at some of them and would number the classes otherwise.
_NO_TEXT = ("Cc", "Zl", "Zp")
CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class ClassSet:
    """Class names and sentence templates ("a photo of a {c}") of one zero-shot set. source: where they are from, "" for its own."""

    names: list[str]
    templates: list[str]
    source: str = ""


def read_class_set(folder: str, key: str) -> ClassSet:
    """The two text files of a set laid out as CLIP_benchmark's. Raises ValueError naming the recipe's key, the file and the line."""
    of = f"{key} = {folder!r}"
    return ClassSet(lines_of(Path(folder) / CLASSES, of), templates_of(Path(folder) / TEMPLATES, of))


def templates_of(path: Path, key: str) -> list[str]:
    """The templates in a file. Raises ValueError, which begins with `key`, for one without the place of the class's name."""
    templates = lines_of(path, key)
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template or set("{}") & set(template.replace("{c}", "")):
            raise ValueError(
                f"{key}: line {number} of {TEMPLATES} is {template[:80]!r}: it must hold {{c}}, which the class's "
                "name takes the place of, and no other braces (not {} either), as in 'a photo of a {c}'"
            )
    return templates


def lines_of(path: Path, key: str) -> list[str]:
    """The lines without empty ones at the end. An empty line between names is refused: it would shift the numbers of all that follow."""
    if not path.is_file():
        raise ValueError(
            f"{key}: no {path.name} there; a zero-shot set has {CLASSES} (a name for each class, in the order of their numbers), "
            f"{TEMPLATES} (as 'a photo of a {{c}}') and test/*.tar with .jpg and .cls (the class's number, from 0); or a folder of images "
            f"for each class, as ImageNet's val/CLASS/*.JPEG"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{key}: {path.name} is no UTF-8 text ({error}); convert it, for example with `iconv -f latin1 -t utf8`"
        ) from error
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")]
    if lines == [""]:
        raise ValueError(f"{key}: {path.name} is empty; it needs a line for each {'class' if path.name == CLASSES else 'template'}")
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(f"{key}: line {number} of {path.name} is empty, and lines that follow count from it; remove it")
        if odd := next((sign for sign in line if unicodedata.category(sign) in _NO_TEXT and sign != "\t"), None):
            raise ValueError(f"{key}: line {number} of {path.name} holds the control character {odd!r}: {line[:80]!r}; remove it")
    return lines


def class_embeddings(encoder: Encoder, classes: ClassSet) -> Tensor:
    """(C, D): for each class the mean of its templates' unit embeddings, again of unit length. Classes of one name get one embedding."""
    names = list(dict.fromkeys(classes.names))
    sentences = [template.replace("{c}", name) for name in names for template in classes.templates]
    starts = with_progress(range(0, len(sentences), encoder.batch), "evaluating class names", "batches")
    rows_UD = torch.cat([encoder.encode_texts(sentences[start : start + encoder.batch]) for start in starts])
    rows_UTD = rows_UD.unflatten(0, (len(names), len(classes.templates)))
    place = {name: number for number, name in enumerate(names)}
    return F.normalize(rows_UTD.mean(dim=1), dim=-1)[[place[name] for name in classes.names]]


def accuracies(image_nD: Tensor, label_n: Tensor, class_CD: Tensor, lost: int = 0, lost_labels: Sequence[int] = ()) -> dict[str, float]:
    """{"top1": ..., "top5": ..., "mean_per_class_recall": ..., "f1_macro": ..., "images": n + lost}; embeddings have to be finite.

    mean_per_class_recall, f1_macro: of the classes that have an image, the mean of what is right of each, as CLIP_benchmark's, and of the
    harmonic means of that and of what is right among the images that get the class, as WILDS'.
    lost: further images, which could not be read: they count as wrong, in the class of those whose labels are known, `lost_labels`, and in
    every class alike for the others. Of equally near classes the one with the lower number comes first,
    as in a stable sort: two pairs of ImageNet's classes share their names ("missile", "sunglasses"), and a model that gives every class
    the same score gets the accuracy of guessing one class.
    """
    scores_nC = image_nD @ class_CD.T
    own_n1, class_C = scores_nC.gather(1, label_n.unsqueeze(1)), torch.arange(len(class_CD), device=scores_nC.device)
    earlier_nC = class_C < label_n.unsqueeze(1)
    before_n = ((scores_nC > own_n1) | ((scores_nC == own_n1) & earlier_nC)).sum(dim=1)
    images = len(label_n) + lost
    top = {f"top{most}": (before_n < most).sum().item() / images for most in (1, 5)}
    right_n, guessed_n = (before_n < 1).cpu(), scores_nC.argmax(dim=1).cpu()
    all_labels = torch.cat([label_n.cpu(), torch.tensor(lost_labels, dtype=torch.int64)])
    of_C, right_C, guessed_C = (
        torch.bincount(labels, minlength=len(class_CD)).double() for labels in (all_labels, label_n.cpu()[right_n], guessed_n)
    )
    there_C, known = of_C > 0, len(all_labels) / images
    recall_C, f1_C = right_C / of_C, 2 * right_C / (of_C + guessed_C)
    means = {"mean_per_class_recall": recall_C, "f1_macro": f1_C}
    return {**top, **{name: values[there_C].mean().item() * known if known else 0.0 for name, values in means.items()}, "images": images}
