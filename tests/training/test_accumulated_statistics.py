"""Batch norm under exact accumulation: a step of several pieces moves the running statistics once for each piece, by the forward that
counts, in float32 and in bf16 alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from support.runs import KD, ds_config, train, zero

RESNET = "student.architecture.vision_cfg={ image_size = 64, layers = [1, 1, 1, 1], width = 8, head_width = 16 }"
FIRST = "clip.visual.bn1"
PIECES, MOMENTUM = 4, 0.1
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, stage 3": {"bf16": {"enabled": True}, "zero_optimization": zero(3)},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_step_in_pieces_moves_the_statistics_once_a_piece(name: str, recipe_file: Path, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.BatchNorm2d) and module.num_features == 4 and module.training and torch.is_grad_enabled():
            seen.append(inputs[0].detach())

    config = ds_config(tmp_path / "ds.json", train_micro_batch_size_per_gpu=16 // PIECES, **CONFIGURATIONS[name])
    hook = register_module_forward_pre_hook(note)
    try:
        run = train(recipe_file, "--out", tmp_path / "run", "--ds_config", config, sets=(RESNET, *KD, "optim.steps=1", "optim.warmup=0"))
    finally:
        hook.remove()
    assert run.code == 0, run.err
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_00000001" / "weights.safetensors")
    pieces = [piece.float() for piece in seen if not piece.is_meta][0::2]  # the stem has two of that width
    assert len(pieces) == PIECES
    mean, variance = torch.zeros(4), torch.ones(4)
    for piece in pieces:
        mean = (1 - MOMENTUM) * mean + MOMENTUM * piece.mean(dim=(0, 2, 3))
        variance = (1 - MOMENTUM) * variance + MOMENTUM * piece.var(dim=(0, 2, 3))
    torch.testing.assert_close(saved[f"{FIRST}.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(saved[f"{FIRST}.running_var"], variance, rtol=1e-4, atol=1e-5)
    assert saved[f"{FIRST}.num_batches_tracked"] == PIECES


@pytest.mark.parametrize("pieces", [1, 2])
def test_what_activation_checkpointing_computes_again_moves_no_statistics(pieces: int, recipe_file: Path, tmp_path: Path) -> None:
    tower = (
        "{ image_size = 64, timm_model_name = 'test_efficientnet', timm_model_pretrained = false, timm_pool = 'avg', timm_proj = 'linear' }"
    )
    sets = (
        f"student.architecture.vision_cfg={tower}",
        "student.activation_checkpointing=true",
        "optim.batch=8",
        "optim.steps=1",
        "optim.warmup=0",
    )
    config = ds_config(tmp_path / "ds.json", gradient_accumulation_steps=pieces)
    run = train(recipe_file, "--out", tmp_path / "run", "--ds_config", config, sets=sets)
    assert run.code == 0, run.err
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_00000001" / "weights.safetensors")
    counts = {int(value) for name, value in saved.items() if name.endswith("num_batches_tracked")}
    assert counts == {pieces}
