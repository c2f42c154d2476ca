"""Zero-shot classification: an image belongs to the class whose sentences are nearest, averaged over templates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from megakd.evaluation.encoder import Encoder

# Legend: n images, C classes, T templates, D embedding width.

CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class ClassSet:
    """Class names and sentence templates ("a photo of a {c}") of one zero-shot set."""

    names: list[str]
    templates: list[str]


def read_class_set(folder: str, key: str) -> ClassSet:
    """The two text files of a set laid out as CLIP_benchmark's. Raises ValueError naming the recipe's key and the file."""
    lines = []
    for file in (CLASSES, TEMPLATES):
        path = Path(folder) / file
        if not path.is_file():
            raise ValueError(
                f"{key} = {folder!r}: no {file} there; a zero-shot set has {CLASSES}, {TEMPLATES} and test/*.tar with .jpg and .cls"
            )
        lines.append([line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()])
    names, templates = lines
    if not names or not all("{c}" in template for template in templates) or not templates:
        raise ValueError(
            f"{key} = {folder!r}: {CLASSES} has {len(names)} names, and every line of {TEMPLATES} must hold {{c}} for the name"
        )
    return ClassSet(names, templates)


def class_embeddings(encoder: Encoder, classes: ClassSet) -> Tensor:
    """(C, D): for each class the mean of its templates' unit embeddings, again of unit length."""
    sentences = [template.replace("{c}", name) for name in classes.names for template in classes.templates]
    rows_CTD = encoder.texts(sentences).unflatten(0, (len(classes.names), len(classes.templates)))
    return F.normalize(rows_CTD.mean(dim=1), dim=-1)


def accuracies(image_nD: Tensor, label_n: Tensor, class_CD: Tensor) -> dict[str, float]:
    """Fractions of n: {"top1": ..., "top5": ...}."""
    best = (image_nD @ class_CD.T).topk(min(5, len(class_CD)), dim=1).indices
    hits = best == label_n.unsqueeze(1)
    return {"top1": hits[:, 0].double().mean().item(), "top5": hits.any(dim=1).double().mean().item(), "images": len(label_n)}
