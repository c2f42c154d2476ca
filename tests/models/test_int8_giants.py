"""The giants at full size on torch's meta device: seconds each, no memory to speak of."""

from __future__ import annotations

import logging

import open_clip
import pytest
import torch
from torch import nn

from megakd.models.int8.convert import quantise, sources

# Millions of parameters
GIANTS = {
    "ViT-H-14": 986,
    "ViT-H-14-378-quickgelu": 987,
    "ViT-bigG-14": 2540,
    "EVA02-E-14-plus": 5045,
    "PE-Core-bigG-14-448": 2419,
    "ViT-gopt-16-SigLIP2-384": 1872,
}
JOINT = {"visual.trunk.head", "text.text_projection"}


@pytest.mark.parametrize("name", GIANTS)
def test_at_least_98_percent_of_what_is_no_embedding_is_int8(name: str, caplog: pytest.LogCaptureFixture) -> None:
    # `device="meta"` alone builds in memory first: 10 GB for ViT-bigG-14.
    with torch.device("meta"):
        clip = open_clip.create_model(name, load_weights=False, device="meta")
    before = {key: tuple(tensor.shape) for key, tensor in clip.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="megakd.models"):
        report = quantise(clip)
    assert (report.int8 + report.embeddings + report.others) / 1e6 == pytest.approx(GIANTS[name], rel=0.01)
    assert report.fraction >= 0.98
    assert not any(type(module) in (nn.Linear, nn.MultiheadAttention) for key, module in clip.named_modules() if key not in JOINT)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING and record.name == "megakd.models"] == []
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert all(key in logged for key in report.kept)
    assert {source.tensor for source in sources(clip).values()} == before.keys()


def test_a_large_matrix_that_stays_behind_is_a_warning_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        tower = nn.ModuleDict({"known": nn.Linear(1024, 1024), "odd": nn.MultiheadAttention(1024, 8, add_bias_kv=True)})
    report = quantise(tower)
    assert report.kept == {"odd.in_proj_weight": 3 << 20, "odd.out_proj.weight": 1 << 20}
    assert report.int8 == 1 << 20
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("odd.in_proj_weight" in message for message in warned)
    assert any("odd.out_proj.weight" in message for message in warned)


def test_a_negative_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outlier_threshold = -1\.0"):
        quantise(nn.Sequential(nn.Linear(4, 4)), threshold=-1.0)
