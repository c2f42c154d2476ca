"""How far embeddings agree with those that they stand for. Legend: B pairs, D embedding width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Centred rows shorter than this say nothing: the rows of such a batch are all the same to the model.
SHORTEST = 1e-3


@dataclass(frozen=True)
class Agreement:
    """cosine, worst_cosine: of single rows, mean and least. centred: mean cosine of rows from which the batch's mean was taken, which is
    what tells samples apart; of images and of texts, the smaller. NaN where something is not finite.

    top1: share of rows and columns of the similarity matrix whose largest entry is the same one. divergence: mean KL of the softmaxes over
    rows and columns at the teacher's scale. Both None where there are images alone.
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
    """Of unit rows with the unit rows expected. scale: the teacher's logit scale."""
    sides = [(image_BD.double(), expected_image_BD.double())]
    if text_BD is not None and expected_text_BD is not None:
        sides.append((text_BD.double(), expected_text_BD.double()))
    cosines = torch.cat([F.cosine_similarity(found, expected) for found, expected in sides])
    centred = torch.stack([_centred(found, expected) for found, expected in sides])
    told = Agreement(len(image_BD), float(cosines.mean()), float(cosines.min()), float(centred.min()))
    if len(sides) == 1:
        return told
    found, expected = (image @ text.T for image, text in zip(*sides, strict=True))
    same = torch.stack([(found.argmax(dim) == expected.argmax(dim)).double().mean() for dim in (0, 1)])
    kl = [
        F.kl_div(F.log_softmax(scale * found, dim), F.log_softmax(scale * expected, dim), log_target=True, reduction="sum")
        for dim in (0, 1)
    ]
    divergence = torch.stack(kl).sum() / (2 * len(found))
    return Agreement(told.pairs, told.cosine, told.worst_cosine, told.centred, float(same.mean()), float(divergence))


def _centred(found_BD: Tensor, expected_BD: Tensor) -> Tensor:
    mean_D = expected_BD.mean(dim=0)
    tells_B = ~((expected_BD - mean_D).norm(dim=1) < SHORTEST)
    if not tells_B.any():
        return F.cosine_similarity(found_BD, expected_BD).mean()
    return F.cosine_similarity((found_BD - mean_D)[tells_B], (expected_BD - mean_D)[tells_B]).mean()
