"""Hard negatives: is the true caption nearer to its image than a caption with two attributes swapped, a relation turned, ...?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megakd.evaluation.encoder import Encoder

# Legend: N images, F false captions of some of them, f of one, D embedding width.
KEY, MEAN = "negatives", "mean of kinds"


def negatives_of(own: dict[str, Any], where: str) -> dict[str, list[str]]:
    """A sample's false captions by kind, {} where it has none. Raises ValueError for another form than {KIND: FALSE CAPTION or a list}."""
    negatives = own.get(KEY, {})
    form = f'its .json needs {{"{KEY}": {{KIND: FALSE CAPTION, ...}}}}, a text or a list of some for each kind'
    if not isinstance(negatives, dict):
        raise ValueError(f"{where}: its negatives are a {type(negatives).__name__}: {form}")
    by_kind = {}
    for kind, given in negatives.items():
        texts = given if isinstance(given, list) else [given]
        if not texts:
            raise ValueError(f"{where}: its negative {kind!r} holds an empty list: {form}")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                content = "no text" if isinstance(text, str) else f"a {type(text).__name__}"
                raise ValueError(f"{where}: its negative {kind!r} holds {content}: {form}")
        by_kind[kind] = texts
    return by_kind


def margins(encoder: Encoder, image_ND: Tensor, captions: Sequence[str], negatives: Sequence[dict[str, list[str]]]) -> dict[str, Tensor]:
    """By kind of negative, cosine of the true caption minus that of the nearest false one, (n,) for the n samples that have one; NaN of a
    NaN."""
    true_N = (image_ND * encoder.encode_texts(captions)).sum(dim=1)
    by_kind = {}
    for kind in sorted({kind for own in negatives for kind in own}):
        rows = [index for index, own in enumerate(negatives) if kind in own]
        counts = [len(negatives[index][kind]) for index in rows]
        texts_FD = encoder.encode_texts([text for index in rows for text in negatives[index][kind]])
        image_FD = image_ND[rows].repeat_interleave(torch.tensor(counts), dim=0)
        nearest = [own_f.max() for own_f in (image_FD * texts_FD).sum(dim=1).split(counts)]  # a NaN stays one
        by_kind[kind] = true_N[torch.tensor(rows)] - torch.stack(nearest)
    return by_kind


def mean_of_kinds(by_kind: dict[str, dict[str, float]], fewest: int) -> dict[str, float]:
    """{"accuracy": mean over the kinds with `fewest` pairs or more (all where there is none), "kinds": of it, "pairs", "unreadable"}."""
    counted = [scores for scores in by_kind.values() if scores["pairs"] >= fewest] or list(by_kind.values())
    return {
        "accuracy": sum(scores["accuracy"] for scores in counted) / len(counted),
        "kinds": len(counted),
        "pairs": sum(int(scores["pairs"]) for scores in by_kind.values()),
        "unreadable": sum(int(scores["unreadable"]) for scores in by_kind.values()),
    }
