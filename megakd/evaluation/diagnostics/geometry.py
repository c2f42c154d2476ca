"""How a model's embeddings lie on the sphere: the gap between modalities, alignment, uniformity, effective rank.

Legend: N pairs, D a model's width, c rows of a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.evaluation.diagnostics.rows import spread
from megakd_kernels.panels import chunk_rows, chunks
from megakd_kernels.precision import full_precision

_UNIFORMITY_T = 2.0
_PANELS = 4  # of (c, N) in float32 that live at once


def modality_gap(image_ND: Tensor, text_ND: Tensor) -> float:
    """The distance between the mean image and the mean text (Liang et al. 2022, arXiv 2203.02053, section 2)."""
    return float((image_ND.double().mean(0) - text_ND.double().mean(0)).norm())


def alignment(image_ND: Tensor, text_ND: Tensor) -> float:
    """Mean squared distance of a pair's image and text: 0 is perfect (Wang & Isola 2020, arXiv 2005.10242, with alpha = 2)."""
    return float((image_ND.double() - text_ND.double()).square().sum(1).mean())


def uniformity(embedding_ND: Tensor) -> float | None:
    """log mean exp(-2 |x - y|^2) over pairs of different rows: the lower, the more evenly unit rows cover the sphere (ibid., with t = 2).

    Of at most QUERIES rows, evenly spread, with all others. None for one row.
    """
    rows_ND, device = embedding_ND.float(), embedding_ND.device
    count, chosen = len(rows_ND), spread(len(rows_ND), device)
    if count < 2:
        return None
    total = torch.zeros((), dtype=torch.float64, device=device)
    norm_N = rows_ND.square().sum(1)
    with full_precision(device):
        for part in chunks(len(chosen), max(1, chunk_rows(len(chosen), count, torch.float32, device) // _PANELS)):
            own = chosen[part]
            squared_cN = (norm_N[own, None] + norm_N - 2 * rows_ND[own] @ rows_ND.T).clamp_min_(0)
            weights_cN = squared_cN.mul_(-_UNIFORMITY_T).exp_()
            total += weights_cN.scatter_(1, own[:, None], 0.0).sum(dtype=torch.float64)
    return float((total / (len(chosen) * (count - 1))).log())


def effective_rank(embedding_ND: Tensor) -> float | None:
    """exp of the entropy of the singular values as shares of their sum (Roy & Vetterli 2007), of the matrix as it is, without centring.

    From 1, where all rows point one way, to min(N, D). None for zeros alone. The singular values are roots of the (D, D) product's
    eigenvalues, in float64.
    """
    values_ND = embedding_ND.double()
    product = values_ND.T @ values_ND if len(values_ND) > values_ND.shape[1] else values_ND @ values_ND.T
    singular = torch.linalg.eigvalsh(product).clamp_min(0).sqrt()
    # Roots of what is rounding would count as small directions: 1e-8 of the largest, hundreds of times.
    singular = singular[singular > singular.max() * 1e-7]
    if not len(singular) or not float(singular.max()) > 0:
        return None
    shares = singular / singular.sum()
    return float((-(shares * shares.log()).sum()).exp())
