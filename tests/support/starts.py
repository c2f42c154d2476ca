"""Small models that students begin with a part of, saved as files, and what a student of a recipe begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from megakd.models import clip
from megakd.models.clip import ClipModel, ModelSpec
from megakd.models.start.plan import Start
from megakd.models.start.sources import start_of
from megakd.recipe import Model, Recipe, chain
from megakd.runtime.launch import World

ALONE = World(0, 1, torch.device("cpu"))
TEXT = {"context_length": 32, "vocab_size": 128, "width": 48, "heads": 3, "layers": 4}
VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 5, "head_width": 16}
LARGE: dict[str, Any] = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {**VISION, "width": 32, "layers": 3, "mlp_ratio": 3.0},
    "text_cfg": {**TEXT, "width": 32, "heads": 2, "layers": 2},
}


def with_values(model: nn.Module, seed: int = 3) -> nn.Module:
    """No tensor of it is zeros or ones, so that a mistake with norms and biases shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def built(architecture: dict[str, Any], tokenizer: Path, seed: int = 3) -> ClipModel:
    settings = Model(architecture=architecture, tokenizer=str(tokenizer), pretrained="random")
    torch.manual_seed(seed)
    made = clip.build(clip.resolve(settings, "teacher"), torch.device("cpu"))
    with_values(made.clip, seed)
    return made


def saved(model: nn.Module, path: Path) -> str:
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    return str(path)


def recipe(student: dict[str, Any], **more: Any) -> Recipe:
    learned = {"objectives": {"contrastive": 1.0}, "optim": {"steps": 1, "batch": 4, "lr": 1e-3, "warmup": 0}}
    return Recipe.model_validate({"name": "started", "data": {"train": "none.tar"}, "student": student, **learned, **more})


def described(student: dict[str, Any], **more: Any) -> tuple[ModelSpec, Start]:
    """The student and what it would begin with; of that no value is read."""
    wanted = recipe(student, **more)
    settings = chain.with_text(wanted)
    assert settings is not None
    description = clip.resolve(settings, "student")
    start = start_of(wanted, description)
    start.fetch()
    return description, start


def begun(student: dict[str, Any], seed: int = 0, **more: Any) -> tuple[Any, Start]:
    """The student as a run begins with it, and what it begins with."""
    description, start = described(student, **more)
    torch.manual_seed(seed)
    made = clip.build(description, torch.device("cpu")).clip
    start.load(made, (), ALONE)
    return made.eval(), start


def drawn(student: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """The state of a student without any weights."""
    torch.manual_seed(seed)
    state: dict[str, torch.Tensor] = clip.build(clip.resolve(recipe(student).student, "student"), torch.device("cpu")).clip.state_dict()  # type: ignore[arg-type]
    return state
