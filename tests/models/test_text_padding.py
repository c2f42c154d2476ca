"""Texts padded to the longest of their batch: which towers take them, and that embeddings and gradients are those of whole texts."""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from megakd.models import clip
from megakd.models.text_padding import ToLongest
from megakd.recipe import Student, Teacher
from megakd.teachers.sharded import text_tower

TEXT = {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": TEXT,
}
TOWERS = {
    "argmax": SMALL,
    "eos": {**SMALL, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}},
    "TextTransformer": {**SMALL, "custom_text": True, "text_cfg": {**TEXT, "proj_bias": True}},
    "custom blocks": {**SMALL, "custom_text": True, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407, "qk_norm": True}},
}
CAPTIONS = ["a dog", "two black cats on a wooden market table", ""]


def built(architecture: dict[str, Any], text_padding: str) -> clip.ClipModel:
    torch.manual_seed(0)
    settings = Student.model_validate({"architecture": architecture, "text_padding": text_padding})
    return clip.build(clip.resolve(settings, "student"), torch.device("cpu"))


def embedded(model: clip.ClipModel, tokens: Tensor) -> Tensor:
    embedding: Tensor = model.clip.encode_text(tokens)  # type: ignore[operator]
    return embedding


@pytest.mark.parametrize("name", TOWERS)
def test_a_shorter_text_has_the_embedding_and_the_gradient_of_a_whole_one(name: str) -> None:
    plain, longest = built(TOWERS[name], "max_length"), built(TOWERS[name], "longest")
    whole = plain.description.tokenize(CAPTIONS).long()
    short = longest.description.padded(longest.description.tokenize)(CAPTIONS)
    assert (whole.shape, short.shape) == ((3, 40), (3, 16))  # 8 words and both ends
    assert torch.equal(embedded(longest, whole), embedded(plain, whole))
    expected, found = embedded(plain, whole), embedded(longest, short)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for embedding in (expected, found):
        embedding.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in longest.clip.named_parameters() if parameter.grad is not None}
    others = {key: parameter.grad for key, parameter in plain.clip.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TOWERS)
def test_the_text_side_alone_and_a_copy_take_shorter_texts_too(name: str) -> None:
    model = built(TOWERS[name], "longest")
    tokens = model.description.padded(model.description.tokenize)(CAPTIONS)
    expected = embedded(model, tokens)
    assert torch.equal(text_tower(copy.deepcopy(model.clip))(tokens), expected)  # as a partitioned teacher holds it
    assert model.clip.state_dict().keys() == built(TOWERS[name], "max_length").clip.state_dict().keys()


def test_lengths_are_steps_of_eight_and_never_beyond_the_context() -> None:
    tokenize = open_clip.SimpleTokenizer(context_length=20)
    cut = ToLongest(tokenize, "argmax", 49407)
    for words, length in {1: 8, 6: 8, 7: 16, 14: 16, 15: 20, 60: 20}.items():
        texts = ["dog", " ".join(["dog"] * words)]
        assert cut(texts).shape == (2, length)
        assert torch.equal(cut(texts), tokenize(texts)[:, :length])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ({"no_causal_mask": True}, "is not causal"),
        ({"pool_type": "last"}, "its pool_type is 'last'"),
        ({"pool_type": "first"}, "its pool_type is 'first'"),
        ({"embed_cls": True}, "a CoCa reads a token that stands behind the padding"),
    ],
)
def test_a_tower_whose_embeddings_would_change_is_refused(text: dict[str, Any], why: str) -> None:
    architecture = {**SMALL, "custom_text": True, "text_cfg": {**TEXT, **text}}
    with pytest.raises(ValueError, match=rf"student\.text_padding = 'longest': .*{why}.*; take it out"):
        clip.resolve(Student.model_validate({"architecture": architecture, "text_padding": "longest"}), "student")


def test_a_teacher_of_images_alone_has_no_texts_to_pad() -> None:
    settings = Teacher(model="timm:vit_tiny_patch16_224", pretrained="random", text_padding="longest")
    with pytest.raises(ValueError, match=r"teacher\.text_padding = 'longest': it sees images alone"):
        clip.resolve(settings, "teacher")
