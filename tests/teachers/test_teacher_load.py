"""The benchmark of loading: what it refuses, and the file that it writes. What it measures is in test_sharded_teacher, marked slow."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch

from megakd.benchmarks import teacher_load, teacher_load_side
from megakd.models import streaming
from megakd.models.weights import SafetensorsFiles
from megakd.runtime.launch import World


@pytest.mark.parametrize(("model", "mode", "told"), [("ViT-S-32", "zero4", "--mode zero4"), ("ViT-XXS", "zero3", "--model ViT-XXS")])
def test_an_unknown_mode_or_model_is_refused_by_name(model: str, mode: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        teacher_load.run(model, mode, 2)


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(teacher_load.shutil, "disk_usage", lambda path: usage(1, 1, 10**6))
    with pytest.raises(ValueError, match=r"0\.0 GB left, ViT-S-32-alt takes 0\.1 GB"):
        teacher_load.write_random("ViT-S-32-alt", tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_written_weights_are_the_models_and_keep_its_embeddings_finite(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    teacher_load.write_random("ViT-S-32-alt", path)
    assert path.stat().st_size == pytest.approx(
        2 * sum(torch.Size(shape).numel() for shape in SafetensorsFiles(path).shapes.values()), rel=0.01
    )
    described = teacher_load_side.description("ViT-S-32-alt", str(path))
    clip = streaming.load(described, World(0, 1, torch.device("cpu")), "bf16", int8=streaming.Int8()).clip
    image = clip.encode_image(torch.randn(1, 3, 224, 224, dtype=torch.bfloat16))  # type: ignore[operator]
    assert image.isfinite().all()
    assert image.std() > 0
