"""Do two models order the partners of an image, or of a text, alike? Rows of their similarity matrices, side by side.

Formed in panels of some rows, over all columns; of more than QUERIES rows that many are taken, evenly spread.
Legend: N pairs, c rows of a panel, D a model's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.models.embeddings import Embeddings
from megakd.objectives.teacher_scale import bisected, row_entropy
from megakd.runtime import watchdog
from megakd_kernels.distributed import Ranks
from megakd_kernels.panels import chunk_rows, chunks
from megakd_kernels.precision import full_precision

QUERIES = 4096
_PANELS = 12  # of (c, N) in float32 that live at once, beside two that a sort takes


@dataclass(frozen=True)
class Agreement:
    """Means over rows. kl: of the teacher's softmax from the student's, KL(teacher || student) in nats, each at its own logit scale.

    top1: share of the rows whose best column is the same. spearman: rank correlation of the rows, 0 for a row without an order.
    """

    kl: float
    top1: float
    spearman: float


def agreement(student: Embeddings, teacher: Embeddings, *, of_texts: bool = False) -> Agreement:
    """Of each image's similarities to all texts, or of each text's to all images. Logits are scale * cosine, in float32."""
    sides = [(one.text, one.image) if of_texts else (one.image, one.text) for one in (student, teacher)]
    device, chosen = student.image.device, spread(len(student.image), student.image.device)
    (left_s, right_s), (left_t, right_t) = ((left.float()[chosen], right.float()) for left, right in sides)
    totals_3 = torch.zeros(3, dtype=torch.float64, device=device)
    size = max(1, chunk_rows(len(chosen), len(right_s), torch.float32, device) // _PANELS)
    with torch.no_grad(), full_precision(device):
        for rows in chunks(len(chosen), size):
            watchdog.beat("comparing rows of similarities")
            cosine_s, cosine_t = left_s[rows] @ right_s.T, left_t[rows] @ right_t.T
            log_s, log_t = ((one.scale.float() * cosine).log_softmax(1) for one, cosine in ((student, cosine_s), (teacher, cosine_t)))
            kl_c = (log_t.exp() * (log_t - log_s)).sum(1)
            same_c = cosine_s.argmax(1) == cosine_t.argmax(1)
            totals_3 += torch.stack([part.sum(dtype=torch.float64) for part in (kl_c, same_c, _correlations(cosine_s, cosine_t))])
    return Agreement(*(totals_3 / len(chosen)).tolist())


def entropy(model: Embeddings) -> float:
    """Mean entropy of the softmaxes of images over texts, in nats, at the model's own logit scale."""
    return float(row_entropy(_queries(model), model.scale, Ranks(None, 0, 1))[0])


def effective_temperature(student: Embeddings, teacher_entropy: float) -> float:
    """The temperature, 1 / logit scale, at which the student's rows have the teacher's entropy; found as a matched scale is."""
    target = torch.tensor(teacher_entropy, dtype=torch.float64, device=student.image.device)
    return 1 / float(bisected(_queries(student), target, Ranks(None, 0, 1)).exp())


def spread(count: int, device: torch.device) -> Tensor:
    """Indices of at most QUERIES of `count` rows, evenly spread."""
    taken = min(count, QUERIES)
    return torch.arange(taken, device=device) * count // max(1, taken)


def _queries(model: Embeddings) -> Embeddings:
    return model._replace(image=model.image[spread(len(model.image), model.image.device)])


def _correlations(first_cN: Tensor, second_cN: Tensor) -> Tensor:
    """(c,) Spearman's correlations, where ties share their mean rank."""
    first, second = (_ranks(values) for values in (first_cN, second_cN))
    size_c = (first.square().sum(1) * second.square().sum(1)).sqrt()
    return torch.where(size_c > 0, (first * second).sum(1) / size_c.clamp_min(torch.finfo(size_c.dtype).tiny), 0)


def _ranks(values_cN: Tensor) -> Tensor:
    """(c, N) ranks less their mean, in float64."""
    sorted_cN = values_cN.sort(1).values
    below, to = (torch.searchsorted(sorted_cN, values_cN, right=right) for right in (False, True))
    return (below + to).double() / 2 - values_cN.shape[1] / 2
