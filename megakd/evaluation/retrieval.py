"""Image-to-text and text-to-image retrieval: of N pairs, how often is the right partner among the nearest 1, 5, 10?"""

from __future__ import annotations

import torch
from torch import Tensor

CUTOFFS = (1, 5, 10)
_QUERIES_AT_ONCE = 1024

# Legend: N pairs, q queries at once, D embedding width.


def recalls(image_ND: Tensor, text_ND: Tensor) -> dict[str, dict[str, float]]:
    """{"image_to_text": {"R@1": ..., "R@5": ..., "R@10": ...}, "text_to_image": {...}}, fractions of N."""
    return {"image_to_text": _one_way(image_ND, text_ND), "text_to_image": _one_way(text_ND, image_ND)}


def _one_way(query_ND: Tensor, candidate_ND: Tensor) -> dict[str, float]:
    ranks_N = torch.cat([_ranks(query_ND, candidate_ND, start) for start in range(0, len(query_ND), _QUERIES_AT_ONCE)])
    return {f"R@{cutoff}": (ranks_N < cutoff).double().mean().item() for cutoff in CUTOFFS}


def _ranks(query_ND: Tensor, candidate_ND: Tensor, start: int) -> Tensor:
    """Candidates at least as similar as the partner, the partner left out. Ties count against: equal embeddings retrieve nothing."""
    queries_qD = query_ND[start : start + _QUERIES_AT_ONCE]
    similarity_qN = queries_qD @ candidate_ND.T
    partner_q1 = similarity_qN.gather(1, torch.arange(start, start + len(queries_qD)).unsqueeze(1))
    return (similarity_qN >= partner_q1).sum(dim=1) - 1
