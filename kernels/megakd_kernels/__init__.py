"""Losses over the image-text similarity matrix, large batches without storing it. Imports torch alone and knows nothing of megakd."""

from megakd_kernels.contract import Pair, SimilarityLoss
from megakd_kernels.reference import contrastive_reference, similarity_kd_reference
from megakd_kernels.similarity import contrastive, similarity_kd

__all__ = ["Pair", "SimilarityLoss", "contrastive", "contrastive_reference", "similarity_kd", "similarity_kd_reference"]
