"""Losses over the image-text similarity matrix, large batches without storing it. Imports torch alone and knows nothing of megakd."""

from megakd_kernels.dispatch import BACKENDS, choose
from megakd_kernels.distributed import gather_with_grad
from megakd_kernels.interactive import interactive_kd
from megakd_kernels.reference import contrastive_reference, interactive_kd_reference, sigmoid_kd_reference, similarity_kd_reference
from megakd_kernels.sigmoid import sigmoid_kd
from megakd_kernels.similarity import contrastive, similarity_kd
from megakd_kernels.types import BiasedPair, Pair, SimilarityLoss

__all__ = [
    "BACKENDS",
    "BiasedPair",
    "Pair",
    "SimilarityLoss",
    "choose",
    "contrastive",
    "contrastive_reference",
    "gather_with_grad",
    "interactive_kd",
    "interactive_kd_reference",
    "sigmoid_kd",
    "sigmoid_kd_reference",
    "similarity_kd",
    "similarity_kd_reference",
]
