"""Image-to-text and text-to-image retrieval: how often is a right partner among the nearest 1, 5, 10?

As CLIP_benchmark's zeroshot_retrieval.py: a text retrieves its one image; an image any of its texts. A query whose partner could not be
read is a miss. A tie is a miss: candidates as similar as the partner rank before it, where CLIP_benchmark leaves the order to `torch.topk`;
other texts of the same image are not candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUTOFFS = (1, 5, 10)
TIES = "a miss"
_QUERIES_AT_ONCE = 1024

# Legend: N images, T captions, U different sentences among them, q queries at once, D embedding width.


def recalls(
    image_ND: Tensor,
    text_UD: Tensor,
    image_of_T: Tensor | None = None,
    text_of_T: Tensor | None = None,
    *,
    lost_images: int = 0,
    lost_captions: int = 0,
) -> dict[str, dict[str, float]]:
    """{"image_to_text": {"R@1": ..., "R@5": ..., "R@10": ...}, "text_to_image": {...}}, fractions of the images and of the captions,
    rounded to float32 as CLIP_benchmark's means are.

    image_of_T, text_of_T: (T,) int64, the row of each caption's image and of its sentence; default: pairs, row by row.
    lost_images, lost_captions: queries that could not be read, on top of the rows; they are misses and no candidates.
    Embeddings have to be finite. Source: clip_benchmark/metrics/zeroshot_retrieval.py of LAION-AI/CLIP_benchmark
    """
    text_of_T = torch.arange(len(text_UD)) if text_of_T is None else text_of_T
    image_of_T = torch.arange(len(text_of_T)) if image_of_T is None else image_of_T
    images = [_texts_before(image_ND, text_UD, image_of_T, text_of_T, start) for start in range(0, len(image_ND), _QUERIES_AT_ONCE)]
    texts = [_images_before(image_ND, text_UD, image_of_T, text_of_T, start) for start in range(0, len(text_of_T), _QUERIES_AT_ONCE)]
    return {"image_to_text": _among(images, lost_images), "text_to_image": _among(texts, lost_captions)}


def _among(before: list[Tensor], lost: int) -> dict[str, float]:
    ranks = torch.cat([torch.zeros(0, dtype=torch.int64), *before])
    queries = len(ranks) + lost
    return {f"R@{cutoff}": ((ranks < cutoff).sum().float() / max(queries, 1)).item() for cutoff in CUTOFFS}


def _texts_before(image_ND: Tensor, text_UD: Tensor, image_of_T: Tensor, text_of_T: Tensor, start: int) -> Tensor:
    """For each image the captions of others at least as similar as the best of its own; all of them, where it has none."""
    images_qD = image_ND[start : start + _QUERIES_AT_ONCE]
    similarity_qT = (images_qD @ text_UD.T)[:, text_of_T]
    own_qT = image_of_T == torch.arange(start, start + len(images_qD)).unsqueeze(1)
    if not len(text_of_T):
        return torch.full((len(images_qD),), max(CUTOFFS))
    best_q1 = similarity_qT.masked_fill(~own_qT, -torch.inf).amax(dim=1, keepdim=True)
    before_q = ((similarity_qT >= best_q1) & ~own_qT).sum(dim=1)
    return before_q.masked_fill(~own_qT.any(dim=1), max(CUTOFFS))


def _images_before(image_ND: Tensor, text_UD: Tensor, image_of_T: Tensor, text_of_T: Tensor, start: int) -> Tensor:
    """For each caption the other images at least as similar as its own."""
    similarity_qN = text_UD[text_of_T[start : start + _QUERIES_AT_ONCE]] @ image_ND.T
    partner_q1 = similarity_qN.gather(1, image_of_T[start : start + _QUERIES_AT_ONCE].unsqueeze(1))
    return (similarity_qN >= partner_q1).sum(dim=1) - 1
