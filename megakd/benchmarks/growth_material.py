"""What `bench growth` trains on: towers so small that all else shows, thousands of shards, up to a million questions about few images."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megakd.benchmarks.common.side_by_side import UNREACHED
from megakd.data.shapes import write_world
from megakd.data.shapes.pixels import jpeg
from megakd.data.shapes.shards import write_atomically

PAIRS_A_SHARD, IMAGES = 32, 16
PAIRS, QUESTIONS = 32, 8  # of a rank's part of a step, where the batch is not what grows
_SIZE = {"image_size": 36, "patch_size": 12, "width": 32, "layers": 1, "head_width": 16}
TOWERS: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": _SIZE,
    "text_cfg": {"context_length": 32, "vocab_size": 128, "width": 32, "heads": 2, "layers": 1},
}
DECODER: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
    **{"max_position_embeddings": 128, "tie_word_embeddings": False},
}
_SAID = [("what is there ?", "a red circle"), ("is there a blue square ?", "yes"), ("how many things are there ?", "two")]


@dataclass(frozen=True)
class Material:
    """A folder with the shapes world's tokenizer, one shard of it and as many hard links to that as were asked for."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> Material:
        write_world(folder / "world", train=PAIRS_A_SHARD, test=2, shard_size=PAIRS_A_SHARD, zeroshot_per_class=1)
        for name in ("shards", "images", "questions"):
            (folder / name).mkdir()
        return cls(folder)

    def shards(self, count: int) -> str:
        """The pattern of the first `count` shards, each with a name and an index of its own; links that are missing are made."""
        source, folder = self.folder / "world" / "train" / "00000.tar", self.folder / "shards"
        for number in range(count):
            path = folder / f"{number:05d}.tar"
            if not path.exists():
                os.link(source, path)
        return f"{folder}/{{00000..{count - 1:05d}}}.tar"

    def questions(self, count: int) -> Path:
        """A file of `count` conversations as LLaVA's are, a question each, about IMAGES images. About 150 bytes a question."""
        path = self.folder / "questions" / f"{count}.json"
        if path.exists():
            return path
        _write_images(self.folder / "images")
        with path.open("w", encoding="utf-8") as file:
            for number in range(count):
                asked, answer = _SAID[number % len(_SAID)]
                said = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
                entry = {"id": str(number), "image": f"{number % IMAGES}.jpg", "conversations": said}
                file.write(("[" if number == 0 else ",\n") + json.dumps(entry))
            file.write("]\n")
        return path

    def of_pairs(self, shards: int, batch: int) -> dict[str, Any]:
        """A recipe, as a run.json holds it: contrastive and similarity loss from a live teacher as small as the student."""
        towers = {"architecture": TOWERS, "tokenizer": str(self.folder / "world" / "tokenizer")}
        return {
            **self._common("growth-pairs", batch),
            "data": {"train": self.shards(shards), "workers": 0},
            "student": towers,
            "teacher": {**towers, "pretrained": "random"},
            "objectives": {"contrastive": 1.0, "similarity": 1.0},
        }

    def of_questions(self, questions: int, batch: int) -> dict[str, Any]:
        """A recipe whose decoder learns from a file of so many questions. By its weight a source may be smaller than a batch."""
        tokenizer, images = str(self.folder / "world" / "tokenizer"), str(self.folder / "images")
        source = {"format": "llava", "questions": str(self.questions(questions)), "images": images, "weight": 1.0}
        return {
            **self._common("growth-questions", batch),
            "data": {"workers": 0},
            "student": {"architecture": TOWERS, "tokenizer": tokenizer},
            "decoder": {
                **{"architecture": DECODER, "tokenizer": tokenizer, "adapt": "full", "image_tokens": 4, "layer": -1},
                **{"template": "{question}", "instruction": ""},
            },
            "answers": {"max_length": 64, "train": {"questions": source}},
        }

    @staticmethod
    def _common(name: str, batch: int) -> dict[str, Any]:
        return {
            "name": name,
            "optim": {"steps": UNREACHED, "batch": batch, "lr": 1e-4, "warmup": 1000},
            "checkpoint": {"every": UNREACHED},
            "log": {"every": 1},
        }


def _write_images(folder: Path) -> None:
    for number in range(IMAGES):
        write_atomically(folder / f"{number}.jpg", jpeg(np.random.default_rng(number).integers(0, 256, (36, 36, 3), np.uint8)))
