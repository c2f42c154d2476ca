"""How far an int8 teacher's embeddings agree with those of the original. Legend: B pairs, D embedding width."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

# Shorter centred rows are left out: their direction is noise.
SHORTEST = 1e-3


@dataclass(frozen=True)
class Agreement:
    """cosine, worst_cosine: mean and smallest over rows. centred: mean cosine after subtracting the batch's mean, of images or of texts,
    whichever is smaller: what remains distinguishes samples. NaN where something is not finite.

    top1: share of rows and columns of the similarity matrix whose largest entry is the same one. divergence: mean KL of the softmaxes over
    rows and columns at the teacher's scale. Both None for images alone.
    """

    pairs: int
    cosine: float
    worst_cosine: float
    centred: float
    top1: float | None = None
    divergence: float | None = None

    def __str__(self) -> str:
        text = f"centred cosine {self.centred:.4f}, cosine {self.cosine:.4f} (worst {self.worst_cosine:.4f})"
        if self.top1 is not None:
            text += f", top-1 of similarities {100 * self.top1:.1f} %, KL {self.divergence:.1e}"
        return f"{text}, {self.pairs} pairs"


def agreement(
    image_BD: Tensor, expected_image_BD: Tensor, text_BD: Tensor | None, expected_text_BD: Tensor | None, scale: float
) -> Agreement:
    """Of unit rows with the expected unit rows. scale: the teacher's logit scale."""
    pairs = [(image_BD.double(), expected_image_BD.double())]
    if text_BD is not None and expected_text_BD is not None:
        pairs.append((text_BD.double(), expected_text_BD.double()))
    cosines = torch.cat([F.cosine_similarity(actual, expected) for actual, expected in pairs])
    centred = torch.stack([_centred(actual, expected) for actual, expected in pairs]).min()  # NaN of a NaN
    result = Agreement(len(image_BD), float(cosines.mean()), float(cosines.min()), float(centred))
    if len(pairs) == 1:
        return result
    actual, expected = (image @ text.T for image, text in zip(*pairs, strict=True))
    same = torch.stack([(actual.argmax(dim) == expected.argmax(dim)).double().mean() for dim in (0, 1)])
    kl = [
        F.kl_div(F.log_softmax(scale * actual, dim), F.log_softmax(scale * expected, dim), log_target=True, reduction="sum")
        for dim in (0, 1)
    ]
    return replace(result, top1=float(same.mean()), divergence=float(torch.stack(kl).sum() / (2 * len(actual))))


def _centred(actual_BD: Tensor, expected_BD: Tensor) -> Tensor:
    mean_D = expected_BD.mean(dim=0)
    long_B = ~((expected_BD - mean_D).norm(dim=1) < SHORTEST)  # NaN included
    if not long_B.any():
        return F.cosine_similarity(actual_BD, expected_BD).mean()
    return F.cosine_similarity((actual_BD - mean_D)[long_B], (expected_BD - mean_D)[long_B]).mean()
