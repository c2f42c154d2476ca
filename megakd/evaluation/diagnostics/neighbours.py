"""Do two embeddings of the same examples have the same neighbours? The mutual nearest neighbours of Huh et al. 2024.

Legend: N examples, P and Q widths, c rows of a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.evaluation.diagnostics.rows import spread
from megakd_kernels.panels import chunk_rows, chunks
from megakd_kernels.precision import full_precision

K = 10  # as there
_PANELS = 3  # of (c, N) in float32 that live at once


def mutual_neighbours(first_NP: Tensor, second_NQ: Tensor, k: int = K) -> float:
    """The mean share of an example's k nearest others by cosine, in one embedding, that are among them in the other (arXiv 2405.07987,
    appendix A). Embeddings are unit rows; of two that have nothing in common it is k / (N - 1).

    Of at most QUERIES examples, evenly spread, among all others. Raises ValueError where an example has fewer than k others.
    """
    count, device = len(first_NP), first_NP.device
    if count <= k:
        raise ValueError(f"{count} examples: {k} nearest neighbours need {k + 1}")
    chosen, shared = spread(count, device), torch.zeros((), dtype=torch.int64, device=device)
    first, second = first_NP.float(), second_NQ.float()
    with full_precision(device):
        for part in chunks(len(chosen), max(1, chunk_rows(len(chosen), count, torch.float32, device) // _PANELS)):
            own = chosen[part]
            near = [(rows[own] @ rows.T).scatter_(1, own[:, None], -torch.inf).topk(k, dim=1).indices for rows in (first, second)]
            shared += (near[0][:, :, None] == near[1][:, None, :]).sum()
    return float(shared) / (k * len(chosen))
