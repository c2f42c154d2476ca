"""Trains a decoder on two ranks, or on one, through DeepSpeed's stages and saves what it exported: `decoder.py TOKENIZER FOLDER`.

Started by test_decoder_zero.py. The second half of the rows, rank 1's of two, has no image.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megakd import recipe
from megakd.models.patches import patch_tokens
from megakd.recipe import Optim
from megakd.runtime import launch
from megakd.runtime.engine import Engine, State
from megakd.runtime.launch import World
from support.decoders import QWEN, make_decoder, make_towers, questions
from support.parameter_groups import decay_groups
from support.runs import zero

ROWS, STEPS = 4, 3
OPTIM = Optim(steps=STEPS, batch=ROWS, lr=0.01, weight_decay=0.1, clip=1.0, eps=1e-3)
LORA = recipe.Lora(rank=4, alpha=8.0, dropout=0.0)
# adapt, architecture, whether the tower learns
CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapt": "lora"},
    "lora_tower": {"adapt": "lora", "tower": True},
    "full_tied": {"adapt": "full", "architecture": QWEN},
}
CONFIGURATIONS = {
    "stage2": {"zero_optimization": zero(2)},
    "stage3": {"zero_optimization": zero(3)},
    "stage3_bf16": {"zero_optimization": zero(3), "bf16": {"enabled": True}},
}


class Answering(nn.Module):
    """A tower and the decoder that reads it."""

    def __init__(self, tokenizer: Path, adapt: str, tower: bool = False, architecture: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.visual: nn.Module = make_towers(tokenizer).clip.visual  # type: ignore[assignment]
        more = {} if architecture is None else {"architecture": architecture}
        self.decoder = make_decoder(tokenizer, self.visual, adapt=adapt, lora=LORA, **more)
        self.visual.requires_grad_(tower)

    def forward(self, pixels: Tensor, *asked: Tensor) -> dict[str, Tensor]:
        return self.decoder(patch_tokens(self.visual, pixels, -2), *asked)


def measure(tokenizer: Path, case: str, configuration: str, world: World) -> dict[str, Any]:
    shared = {"train_batch_size": ROWS, "train_micro_batch_size_per_gpu": ROWS // world.size, "gradient_accumulation_steps": 1}
    config = {**CONFIGURATIONS[configuration], **shared, "gradient_clipping": OPTIM.clip, "steps_per_print": 10**9}
    module = Answering(tokenizer, **CASES[case])
    engine = Engine(module, decay_groups(module, OPTIM.weight_decay), OPTIM, config, world, None)
    start = engine.export(moments=False, everywhere=True).weights
    own = slice(world.rank * ROWS // world.size, (world.rank + 1) * ROWS // world.size)
    norms = []
    for step in range(STEPS):
        pixels = torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        asked = questions([6, 9, 5, 11], [True, True, False, False], 4, seed=step)
        learned = (asked.labels_BL != -100).sum()
        found = engine.forward(pixels[own].to(engine.dtype), *(part[own] for part in asked))
        engine.backward(found["answer_nll"].sum() * world.size / learned)
        engine.update(OPTIM.lr)
        norms.append(engine.gradient_norm)
    state: State = engine.export(moments=True, everywhere=True)
    return {"norms": norms, "start": start, "end": state.weights}


def measure_all(tokenizer: Path, world: World, folder: Path) -> None:
    """Writes FOLDER/CASE_CONFIGURATION.pt on the main rank."""
    for case in CASES:
        for configuration in CONFIGURATIONS:
            found = measure(tokenizer, case, configuration, world)
            if world.is_main:
                torch.save(found, folder / f"{case}_{configuration}.pt")


if __name__ == "__main__":
    measure_all(Path(sys.argv[1]), launch.start(), Path(sys.argv[2]))
    launch.stop()
