"""Hard negatives: is the true caption nearer to its image than a caption with two attributes swapped, a relation turned, ...?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megakd.evaluation.encoder import Encoder

# Legend: N images, D embedding width.


def choices(
    encoder: Encoder, image_ND: Tensor, captions: Sequence[str], negatives: Sequence[dict[str, str]]
) -> dict[str, dict[str, float]]:
    """By kind of negative: {"accuracy": fraction where the true caption wins, "pairs": how many}. Chance is 0.5; a tie is a loss."""
    true_N = (image_ND * encoder.texts(captions)).sum(dim=1)
    results = {}
    for kind in sorted({kind for own in negatives for kind in own}):
        rows = [index for index, own in enumerate(negatives) if kind in own]
        false_n = (image_ND[rows] * encoder.texts([negatives[index][kind] for index in rows])).sum(dim=1)
        results[kind] = {"accuracy": (true_N[torch.tensor(rows)] > false_n).double().mean().item(), "pairs": len(rows)}
    return results
