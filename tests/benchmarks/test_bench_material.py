"""What benchmarks make for both sides."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from megakd.benchmarks.common import material


def test_by_the_fitted_projection_pairs_find_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    image_ND, feature_NW = (torch.randn(24, width, generator=generator) + 2 for width in (32, 48))  # all much alike, as random towers' are
    similarity_NN = F.normalize(image_ND, dim=1) @ (feature_NW @ material.fitted_projection(image_ND, feature_NW)).T
    assert similarity_NN.argmax(1).tolist() == list(range(24))
