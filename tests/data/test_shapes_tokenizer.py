"""The world's tokenizer works for open_clip and transformers, offline."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megakd.data.shapes import captions as told
from megakd.data.shapes import questions as asked
from megakd.data.shapes.scene import COLOURS, SHAPES, draw_scene
from megakd.data.shapes.vocabulary import CONTEXT_LENGTH, END, UNKNOWN, build_tokenizer, vocabulary, world_words, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


def test_every_text_of_the_world_is_known_and_fits_the_context() -> None:
    tokenizer, rng, longest = build_tokenizer(), random.Random(3), 0
    for _ in range(800):
        scene = draw_scene(rng)
        texts = [text for c in told.captions(scene, rng).values() for text in (c.text, *told.negatives(c, scene, rng).values())]
        questions = asked.questions(scene, rng)
        texts += [question.text for question in questions]
        texts += [str(entry["answer"]) for question in questions for entry in asked.ten_answers(question, rng)]
        for text in texts:
            tokens = tokenizer.encode(text).tokens
            assert UNKNOWN not in tokens, text
            longest = max(longest, len(tokens))
    assert longest == 29 <= CONTEXT_LENGTH


def test_ids_suit_argmax_pooling() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.token_to_id("<pad>") == 0
    assert tokenizer.token_to_id(END) == len(vocabulary()) - 1 == tokenizer.get_vocab_size() - 1
    assert len(set(vocabulary())) == len(vocabulary())
    assert {*SHAPES, *COLOURS} <= set(world_words())


def test_transformers_loads_it_with_its_special_tokens(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert len(tokenizer) == len(vocabulary())
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<pad>", "<start>", "<end>", "<unk>")
    ids = tokenizer("What colour is the RED circle?").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what colour is the red circle ?"
    assert tokenizer.unk_token_id in tokenizer("a red zebra").input_ids


def test_open_clip_pools_at_the_end_token(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    open_clip = pytest.importorskip("open_clip")
    context = 24
    tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=context)
    texts = ["a red circle", "Only a  LARGE blue star\n at the center", " ".join(["small"] * 60), ""]
    ids = tokenizer(texts)
    assert ids.shape == (4, context)
    assert ids.argmax(-1).tolist() == [4, 9, context - 1, 1]
    assert (ids == len(vocabulary()) - 1).sum(-1).tolist() == [1, 1, 1, 1]
    assert (ids[:3] != tokenizer.tokenizer.unk_token_id).all()
    assert ids[:, 0].unique().tolist() == [tokenizer.tokenizer.bos_token_id]
    text_cfg: dict[str, Any] = {"context_length": context, "vocab_size": len(tokenizer.tokenizer), "width": 32, "heads": 2, "layers": 1}
    text_cfg["hf_tokenizer_name"] = str(folder)
    vision_cfg = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    torch.manual_seed(0)
    model = open_clip.CLIP(16, vision_cfg, text_cfg).eval()
    with torch.no_grad():
        short = model.encode_text(ids[:1])
        assert torch.isfinite(short).all()
        # What follows the end token changes nothing: the embedding is read at the end token.
        after = ids[:1].clone()
        after[0, 10:] = 5
        assert torch.allclose(model.encode_text(after), short)
        before = ids[:1].clone()
        before[0, 2] = 5
        assert not torch.allclose(model.encode_text(before), short)
