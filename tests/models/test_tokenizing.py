"""A tokenizer is the same in training, by name and as exported, and suits the token at which the text tower's embedding is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megakd.export import clip_folder
from megakd.models import clip
from megakd.models.tokenizing import SAMPLES
from megakd.recipe import Model

WORDS = ["a", "photo", "of", "dog", "cat", "red", "square", "left", "circle", "blue"]
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def _tokenizer(folder: Path, order: list[str], *, ends: bool = True, **config: Any) -> str:
    """A word-level tokenizer with its words in this order, written as Hugging Face does."""
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(order)}, unk_token="<unk>"))
    inner.add_special_tokens([word for word in order if word.startswith("<")])
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, order.index(word)) for word in ("<start>", "<end>") if word in order]
    if ends:
        inner.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=special)
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return str(folder)


END_LAST = ["<pad>", "<unk>", "<start>", *WORDS, "<end>"]
END_THIRD = ["<pad>", "<unk>", "<start>", "<end>", *WORDS]


def _describe(tokenizer: str | None = None, **text: Any) -> clip.ModelSpec:
    architecture = {**ARCHITECTURE, "text_cfg": {**ARCHITECTURE["text_cfg"], **text}}
    return clip.resolve(Model(architecture=architecture, tokenizer=tokenizer), "student")


def test_an_end_token_that_is_the_last_suits_argmax(tmp_path: Path) -> None:
    tokens = _describe(_tokenizer(tmp_path, END_LAST)).tokenize(["a photo of dog"])
    assert tokens[0, tokens[0].argmax()] == END_LAST.index("<end>")


def test_an_end_token_that_is_not_the_last_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    folder = _tokenizer(tmp_path, END_THIRD)
    with pytest.raises(ValueError, match=r"student\.tokenizer = .*pool_type = 'eos' and text_cfg\.eos_id = 3"):
        _describe(folder)
    _describe(folder, pool_type="eos", eos_id=3)
    _describe(folder, pool_type="last")


def test_the_words_that_only_the_vocabulary_knows_count(tmp_path: Path) -> None:
    """None of our samples' words is in it: all of them become the unknown token, which is smaller than the end's."""
    folder = _tokenizer(tmp_path, ["<pad>", "<unk>", "<start>", "<end>", "xylophone", "zeppelin"])
    with pytest.raises(ValueError, match="pool_type = 'argmax'"):
        _describe(folder)


@pytest.mark.parametrize(("eos", "told"), [(2, "not see|does not"), (60, "not every text has")])
def test_an_eos_id_that_ends_no_text_is_refused(eos: int, told: str, tmp_path: Path) -> None:
    """2 is open_clip's default, here the token that starts texts; 60 is none."""
    with pytest.raises(ValueError, match=told):
        _describe(_tokenizer(tmp_path, END_THIRD), pool_type="eos", eos_id=eos)


def test_the_first_token_of_a_causal_text_tower_sees_nothing(tmp_path: Path) -> None:
    folder = _tokenizer(tmp_path, END_LAST)
    with pytest.raises(ValueError, match=r"pool_type = 'first'.*before its last word"):
        _describe(folder, pool_type="first")
    _describe(folder, pool_type="first", no_causal_mask=True)


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    folder = _tokenizer(tmp_path, END_LAST, pad_token=None)
    with pytest.raises(ValueError, match=r"no padding token: set pad_token in its tokenizer_config\.json"):
        _describe(folder)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _tokenizer(tmp_path, END_LAST, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(ValueError, match=r"text_cfg\.tokenizer_kwargs asks to run code"):
        _describe(folder, tokenizer_kwargs={"trust_remote_code": True})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the console"))
    with pytest.raises(ValueError, match=r"student\.tokenizer = "):
        _describe(folder)
    assert not (tmp_path / "ran").exists()


def test_words_dropped_at_random_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reduction_mask = 'random'"):
        _describe(vocab_size=49408, tokenizer_kwargs={"reduction_mask": "random"})


def test_a_folders_tokenizer_has_the_models_settings(tmp_path: Path) -> None:
    """SigLIP's models drop punctuation and case before they tokenise."""
    folder = _tokenizer(tmp_path, END_LAST)
    canonical = _describe(folder, tokenizer_kwargs={"clean": "canonicalize"})
    assert torch.equal(canonical.tokenize(["A, DOG!"]), canonical.tokenize(["a dog"]))
    plain = _describe(folder)
    assert not torch.equal(plain.tokenize(["A, DOG!"]), plain.tokenize(["a dog"]))


def test_an_architecture_that_names_a_tokenizer_gets_it(tmp_path: Path) -> None:
    folder = _tokenizer(tmp_path, END_LAST)
    by_key, by_table = _describe(folder), _describe(hf_tokenizer_name=folder)
    assert torch.equal(by_key.tokenize(list(SAMPLES)), by_table.tokenize(list(SAMPLES)))
    with pytest.raises(ValueError, match="student: its tokenizer"):
        _describe(hf_tokenizer_name=str(tmp_path / "gone"))


def test_a_name_with_a_slash_gets_its_own_tokenizer() -> None:
    """open_clip's own look-up does not know it so, and falls back to another tokenizer with a warning."""
    description = clip.resolve(Model(model="ViT-B/32"), "student")
    assert description.tokenize is not None
    assert description.config == open_clip.get_model_config("ViT-B-32")


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"tokenizer_kwargs": {"clean": "canonicalize"}},
        {"tokenizer_kwargs": {"clean": "lower"}},
        {"tokenizer_mode": "clips", "pool_type": "last", "tokenizer_kwargs": {"clean": "whitespace"}},
        {"no_causal_mask": True, "pool_type": "last"},
    ],
)
@pytest.mark.parametrize("by_key", [True, False])
def test_the_exported_tokenizer_is_the_trained_one(text: dict[str, Any], by_key: bool, tmp_path: Path) -> None:
    folder = _tokenizer(tmp_path / "t", END_LAST, cls_token="<start>")
    text = text if by_key else {**text, "hf_tokenizer_name": folder}
    description = _describe(folder if by_key else None, **text)
    clip_folder.rehearse(description)
    built = clip.build(description, torch.device("cpu"))
    weights = {f"clip.{name}": value for name, value in built.clip.state_dict().items()}
    clip_folder.write_model(tmp_path / "model", weights, built)
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")
    assert torch.equal(theirs(list(SAMPLES)), description.tokenize(list(SAMPLES)))
    again = clip.resolve(Model(model=f"local-dir:{tmp_path / 'model'}"), "student")
    assert torch.equal(again.tokenize(list(SAMPLES)), description.tokenize(list(SAMPLES)))
