"""A tiny decoder with an open_clip tower, and one rank of its evaluation: FOLDER of the sets and the results, SECONDS a batch takes.

The weights are random and large, so that answers differ from question to question; a seed makes them equal in every process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import create_model
from open_clip.transform import PreprocessCfg
from torch import Tensor

from megakd.models import patches
from megakd.models.vlm import decoder
from megakd.recipe import Data, Decoder
from megakd.runtime import collectives, launch
from megakd.runtime.launch import World
from megakd.runtime.preemption import StopPoller
from megakd.vqa.evaluate import Answerer, Opened, evaluate
from megakd.vqa.loader import ImageProcessor
from megakd.vqa.prompts import PromptEncoder
from support import questions as files
from support.shards import data

QUESTIONS = 30
TOWER = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Slow:
    """A decoder that counts what it is asked and takes its time."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self._inner, self._seconds, self.asked = inner, seconds, 0

    def generate(self, visual: Tensor | None, ids_BL: Tensor, *rest: Any) -> list[list[int]]:
        self.asked += len(ids_BL)
        time.sleep(self._seconds)
        found: list[list[int]] = self._inner.generate(visual, ids_BL, *rest)
        return found


def answerer(folder: Path, batch: int, seconds: float = 0.0, *, blind: bool = False, seed: int = 0) -> Answerer:
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1}
    tower = create_model("ViT-B-32", vision_cfg=TOWER, text_cfg=text).visual.eval()
    own = {"architecture": {**LLAMA, "initializer_range": 0.6, "num_key_value_heads": 2}, "tokenizer": str(folder / "tokenizer")}
    settings = Decoder(**own, adapt="none", image_tokens=4, layer=-1, template="{question} ", instruction="")
    description = decoder.resolve(settings)
    built = decoder.build(description, None if blind else tower, torch.device("cpu")).eval()
    if not blind:
        with torch.no_grad():
            for parameter in built.projector.parameters():  # type: ignore[union-attr]
                parameter.mul_(8.0)
    look: Callable[[Tensor], Tensor] | None = None if blind else partial(patches.patch_tokens, tower, layer=-1)
    conversations = PromptEncoder(description.tokenizer, settings, built.image_tokens, 64)
    eyes = None if blind else ImageProcessor(PreprocessCfg(size=(24, 24), resize_mode="squash"), Data(max_pixels=50_000), "tower")
    asked = Slow(built, seconds)
    return Answerer(asked, look, conversations, eyes, torch.device("cpu"), torch.float32, batch, 6, {"seed": seed, "blind": blind})


def opened(folder: Path, *names: str) -> dict[str, Opened]:
    """The sets of these names."""
    sets = {}
    for name in names:
        source = files.WRITERS[name](folder / f"{name}.{os.getpid()}")  # written by each process: another rank may be reading
        sets[name] = Opened(source, files.opened(source, f"evaluation.vqa.{name}"))
    return sets


def run(folder: Path, out: Path, world: World, batch: int, seconds: float, **how: Any) -> tuple[dict[str, Any], int]:
    """The results, and how many questions this rank asked."""
    one = answerer(folder, batch, seconds, **how)
    results = evaluate(opened(folder, "vqav2", "pope"), one, world, out, data("unused.tar"), StopPoller(world))
    assert isinstance(one.decoder, Slow)
    return results, one.decoder.asked


if __name__ == "__main__":
    where, into, wait = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    world = launch.start()
    try:
        run(where, into, world, 3, wait)
        collectives.barrier(world)
    finally:
        launch.stop()
