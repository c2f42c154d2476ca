"""Hard negatives: is the true caption nearer to its image than a caption with two attributes swapped, a relation turned, ...?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megakd.evaluation.encoder import Encoder

# Legend: N images, D embedding width.
KEY = "negatives"


def negatives_of(own: dict[str, Any], where: str) -> dict[str, str]:
    """A sample's false captions by kind, {} where it has none. Raises ValueError for another form than {KIND: FALSE CAPTION}."""
    negatives = own.get(KEY, {})
    form = f'its .json needs {{"{KEY}": {{KIND: FALSE CAPTION, ...}}}}, a text for each kind; name several of one kind KIND_1, KIND_2'
    if not isinstance(negatives, dict):
        raise ValueError(f"{where}: its negatives are a {type(negatives).__name__}: {form}")
    for kind, text in negatives.items():
        if not isinstance(text, str) or not text.strip():
            content = "no text" if isinstance(text, str) else f"a {type(text).__name__}"
            raise ValueError(f"{where}: its negative {kind!r} holds {content}: {form}")
    return negatives


def margins(encoder: Encoder, image_ND: Tensor, captions: Sequence[str], negatives: Sequence[dict[str, str]]) -> dict[str, Tensor]:
    """By kind of negative, cosine of the true caption minus cosine of the false one, (n,) for the n samples that have one; NaN of a NaN."""
    true_N = (image_ND * encoder.encode_texts(captions)).sum(dim=1)
    by_kind = {}
    for kind in sorted({kind for own in negatives for kind in own}):
        rows = [index for index, own in enumerate(negatives) if kind in own]
        false_n = (image_ND[rows] * encoder.encode_texts([negatives[index][kind] for index in rows])).sum(dim=1)
        by_kind[kind] = true_N[torch.tensor(rows)] - false_n
    return by_kind
