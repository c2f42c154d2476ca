"""What a teacher's embeddings depend on, computed from its description alone: no model is built, so a run on a store needs none.

A fingerprint is plain JSON: the open_clip configuration, the weights by checksum, the preprocessing, the tokenizer by what it does.
"""

from __future__ import annotations

import hashlib
import itertools
import string
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor

from megakd.models import pretrained
from megakd.models.clip import ModelSpec
from megakd.models.int8 import matmul
from megakd.models.int8.migration import METHOD
from megakd.models.preprocessing import complete
from megakd.recipe import Teacher
from megakd.runtime import precision

# Set by open_clip while it builds, not by whoever describes the model.
_SET_BY_BUILDING = ("timm_model_pretrained", "hf_model_pretrained")


def fingerprint(description: ModelSpec, seed: int) -> dict[str, Any]:
    """`teacher` (its configuration), `weights`, `preprocess` and `tokenizer`, nested plain values.

    seed: the run's, from which random weights are drawn. Weights of gigabytes are read once for their checksum: rank 0's work.
    """
    towers = {
        name: {key: value for key, value in part.items() if key not in _SET_BY_BUILDING} if isinstance(part, dict) else part
        for name, part in description.config.items()
    }
    preprocess = asdict(preprocessing(description))
    return {
        "teacher": towers,
        "weights": _weights(description, seed),
        "preprocess": {key: list(value) if isinstance(value, tuple) else value for key, value in preprocess.items()},
        "tokenizer": behaviour(description.tokenize),
    }


def computation(description: ModelSpec, device: torch.device) -> dict[str, Any]:
    """How a teacher's embeddings are computed on this device, as far as they depend on it: plain values, None where there is no choice.

    Placement is absent: a teacher gives the same bits replicated and partitioned. The number of calibration pairs is enough, as they lie
    evenly in the training set, which a store's key holds. Raises ValueError for a product that this machine lacks.
    """
    settings = description.settings
    assert isinstance(settings, Teacher), "described from [teacher] or [ensemble] of a recipe"
    return {
        "precision": precision.of(device),
        "int8": settings.int8,
        "outlier_threshold": settings.outlier_threshold if settings.int8 else None,
        "product": matmul.resolved(settings.int8_product, device) if settings.int8 else None,
        "calibration": f"{settings.calibration} pairs, {METHOD}" if settings.int8 and settings.calibration else None,
    }


def preprocessing(description: ModelSpec) -> PreprocessCfg:
    """The preprocessing that the built model has."""
    return complete(description.preprocess, description.config)


def behaviour(tokenize: Callable[[list[str]], Tensor]) -> str:
    """SHA-256 of a tokenizer's output on fixed texts: letters alone, in pairs and threes, digits, signs, other scripts, a long text.

    A digest of what it does, not of its files: the same in every process, wherever its folder lies.
    """
    letters = string.ascii_lowercase
    pairs = [" ".join(first + second for second in letters) for first in letters]
    triples = [
        " ".join("".join(triple) for triple in itertools.islice(itertools.product(letters, repeat=3), start, None, 677))
        for start in range(26)
    ]
    texts = [
        *pairs,
        *triples,
        " ".join(string.printable),
        "A photo of 2 dogs, 17 cats and 360 red-and-blue birds at 12:30; it's the world's oldest (1893).",
        "naïve façade — “Übergröße” 東京 Москва مرحبا 🙂",
        "the quick brown fox jumps over the lazy dog " * 40,
        " ",
    ]
    return hashlib.sha256(tokenize(texts).long().numpy().tobytes()).hexdigest()


def _weights(description: ModelSpec, seed: int) -> dict[str, Any]:
    """name: for people, and for comparing where no file is at hand; sha256: of the file that would be loaded, where it is here."""
    settings = description.settings
    if pretrained.is_random(settings):
        return {"name": f"random, seed {seed}", "sha256": None}
    file = pretrained.weights_file(settings, download=False)
    name = " ".join(part for part in (settings.model, settings.pretrained) if part)
    return {"name": name, "sha256": None if file is None else pretrained.digest(file)}
