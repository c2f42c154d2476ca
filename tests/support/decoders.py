"""A vision tower of 4 x 4 patches and decoders of 64 units that read it, for several tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from megakd import recipe
from megakd.export.bundle import Bundle
from megakd.models import clip
from megakd.models.vlm import decoder
from megakd.recipe import Student
from megakd.recipe import load as recipes
from megakd.runtime.launch import World
from megakd.vqa import evaluate
from megakd.vqa import sets as vqa_questions

CPU = torch.device("cpu")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
LLAMA = {"model_type": "llama", **SMALL}
QWEN = {"model_type": "qwen2", **SMALL, "tie_word_embeddings": True}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 128, "width": 32, "heads": 2, "layers": 1},
}


class Asked(NamedTuple):
    """Legend as in megakd.models.vlm.decoder."""

    ids_BL: Tensor
    attend_BL: Tensor
    image_mask_BL: Tensor
    labels_BL: Tensor


def settings(tokenizer: Path | None, **more: Any) -> recipe.Decoder:
    source = {} if "model" in more else {"architecture": LLAMA}
    named = {} if tokenizer is None else {"tokenizer": str(tokenizer)}
    return recipe.Decoder(**{**named, "image_tokens": 4, **source, **more})


def make_towers(tokenizer: Path, **more: Any) -> clip.ClipModel:
    torch.manual_seed(1)
    return clip.build(clip.resolve(Student(architecture=CLIP, tokenizer=str(tokenizer), **more), "student"), CPU)


def make_decoder(tokenizer: Path | None, tower: nn.Module | None, **more: Any) -> decoder.DecoderModel:
    described = decoder.resolve(settings(tokenizer, **more))
    torch.manual_seed(2)
    return decoder.build(described, tower, CPU)


def evaluated_and_asked_again(run: Path, name: str = "test") -> tuple[list[str], list[str]]:
    """What a run's evaluation was answered, and what its bundle answers to the same questions when it is asked one by one."""
    settings, _ = recipes.load(str(run / "run.json"))
    asked = evaluate.open_sets(settings, World(0, 1, CPU), sees=settings.student is not None)[name].questions
    lines = (run / "answers" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    loaded, again = Bundle.load(run / "bundle", CPU), []
    for one in asked.read(range(len(asked)), True):
        assert isinstance(one, vqa_questions.QuestionWithImage)
        image = None if one.image is None else Image.open(io.BytesIO(one.image))
        again += loaded.answer([image], [one.question.text], settings.evaluation.answer_tokens, short=one.question.short)
    return [json.loads(line)["answer"] for line in lines], again


def questions(lengths: list[int], images: list[bool], places: int, *, left: bool = False, seed: int = 0) -> Asked:
    """Random words: `places` image places where there is an image, then `length` ids of which the last three are learned."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(length + places * image for length, image in zip(lengths, images, strict=True))
    shape = (len(lengths), longest)
    ids, labels = torch.full(shape, 3), torch.full(shape, -100)
    attend, mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, (length, image) in enumerate(zip(lengths, images, strict=True)):
        own = length + places * image
        first = longest - own if left else 0
        words = torch.randint(5, 60, (own,), generator=generator)
        ids[row, first : first + own], attend[row, first : first + own] = words, True
        mask[row, first : first + places * image] = True
        labels[row, first + own - 3 : first + own] = words[-3:]
    return Asked(ids, attend, mask, labels)
