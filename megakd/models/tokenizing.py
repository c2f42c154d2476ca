"""A model's tokenizer, the same in training, evaluation and export, and tried before anything depends on it.

As open_clip does, it follows the configuration (`text_cfg.hf_tokenizer_name`, `tokenizer_mode`, `tokenizer_kwargs`), also where the
recipe gives another folder, so that an exported model tokenises as it was trained.
"""

from __future__ import annotations

import copy
import functools
import string
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from megakd.models.pretrained import HUB, LOCAL
from megakd.recipe import Model

Tokenize = Callable[[list[str]], Tensor]
# Short and long, with punctuation, other scripts, an empty one; the second and third differ in their last word alone.
SAMPLES = (
    *("a", "a photo of a dog", "a photo of a cat", "Two red squares, one blue circle!", "a red square left of a blue circle", ""),
    *("naïve façade — “Übergröße” 東京", "the quick brown fox jumps over the lazy dog " * 60, " ".join(string.ascii_lowercase)),
)
OWN_WORDS = 40
REDUCED_AT_RANDOM = ("simple", "random", "shuffle")


def tokenizer(settings: Model, config: Mapping[str, Any], role: str) -> Tokenize:
    """Raises ValueError naming the key and the remedy: a folder without a tokenizer, more words than the text tower's vocabulary, no
    padding, a text tower that would take its embedding from another token than the end's."""
    text: Mapping[str, Any] = config["text_cfg"]
    key = f"{role}.tokenizer = {settings.tokenizer!r}" if settings.tokenizer is not None else f"{role}: its tokenizer"
    extra = _keyword_arguments(text, key)
    try:
        tokenize = _load(settings, text, extra)
    except Exception as error:
        raise ValueError(f"{key}: {error}") from error
    inner: Any = getattr(tokenize, "tokenizer", tokenize)
    words = len(inner) if hasattr(inner, "__len__") else getattr(inner, "vocab_size", None)
    vocabulary = text.get("vocab_size", 49408)
    if words is not None and words > vocabulary and not text.get("hf_model_name"):
        raise ValueError(
            f"{role}.tokenizer has {words} words, but the text tower's vocab_size is {vocabulary}: raise vocab_size or change the tokenizer"
        )
    with torch.device("cpu"):  # real tokens also for a model that is built on the meta device
        tokens = _try(tokenize, text, key)
        if "multimodal_cfg" not in config and not text.get("hf_model_name") and not text.get("embed_cls"):
            _check_pooling(tokenize, tokens, text, key)
    return tokenize


def _keyword_arguments(text: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`text_cfg.tokenizer_kwargs`. Raises ValueError for those that would run code or make tokens random."""
    extra = text.get("tokenizer_kwargs") or {}
    if not isinstance(extra, dict):
        raise ValueError(f"{key}: text_cfg.tokenizer_kwargs = {extra!r}: a table of settings")
    if extra.get("trust_remote_code"):
        raise ValueError(
            f"{key}: text_cfg.tokenizer_kwargs asks to run code that comes with the tokenizer, which is never done: take it out"
        )
    if (mask := extra.get("reduction_mask")) in REDUCED_AT_RANDOM:
        raise ValueError(
            f"{key}: text_cfg.tokenizer_kwargs.reduction_mask = {mask!r} drops other words each time, so that no run could be repeated: "
            f"take it out"
        )
    return {name: value for name, value in extra.items() if name != "trust_remote_code"}


def _load(settings: Model, text: Mapping[str, Any], extra: dict[str, Any]) -> Tokenize:
    length, name = text.get("context_length", 77), settings.model or ""
    source = text.get("hf_tokenizer_name")
    if settings.tokenizer is not None:
        if not Path(settings.tokenizer).is_dir():
            raise ValueError(
                "no such folder; `megakd data tokenizer` makes one from your captions, `megakd shapes` writes one beside its shards"
            )
        source = settings.tokenizer
    elif source and name.startswith(LOCAL):
        source = name.removeprefix(LOCAL)  # as open_clip does, whatever the key says
    if not source:
        if extra:
            return open_clip.SimpleTokenizer(context_length=length, **extra)  # type: ignore[no-any-return]
        own = copy.copy(_clip_tokenizer())
        own.context_length = length
        return own  # type: ignore[no-any-return]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Cannot set language")
        # trust_remote_code=False: transformers would ask on the console whether a tokenizer's code may run.
        return HFTokenizer(  # type: ignore[no-any-return]
            source.removeprefix(HUB), context_length=length, tokenizer_mode=text.get("tokenizer_mode"), trust_remote_code=False, **extra
        )


@functools.cache
def _clip_tokenizer() -> Any:
    """CLIP's own, read once a process: its 49,000 merges take a fifth of a second."""
    return open_clip.SimpleTokenizer()


def _try(tokenize: Tokenize, text: Mapping[str, Any], key: str) -> Tensor:
    """The samples' tokens, (samples, context): SAMPLES, then words of the tokenizer's own vocabulary."""
    samples = [*SAMPLES, *_own_words(tokenize)]
    length, vocabulary = text.get("context_length", 77), text.get("vocab_size", 49408)
    try:
        tokens, again = tokenize(samples), tokenize(samples[:4])
    except Exception as error:
        if getattr(getattr(tokenize, "tokenizer", None), "pad_token", "") is None:
            raise ValueError(f"{key}: has no padding token: set pad_token in its tokenizer_config.json") from error
        raise ValueError(f"{key}: does not tokenise ({type(error).__name__}: {error})") from error
    if not isinstance(tokens, Tensor) or tuple(tokens.shape) != (len(samples), length):
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{key}: gives {shape} for {len(samples)} texts, where text_cfg.context_length is {length}")
    if not text.get("hf_model_name") and (int(tokens.max()) >= vocabulary or int(tokens.min()) < 0):
        raise ValueError(f"{key}: gives token {int(tokens.max())}, and the text tower's vocab_size is {vocabulary}: raise vocab_size")
    if not torch.equal(tokens[:4], again):
        raise ValueError(f"{key}: gives other tokens for the same texts each time, so that no run could be repeated: take another one")
    return tokens


def _own_words(tokenize: Tokenize) -> list[str]:
    """The words with the largest ids, each alone, then two texts that differ in their last word: it may know no word of SAMPLES."""
    inner: Any = getattr(tokenize, "tokenizer", None)
    if not hasattr(inner, "get_vocab"):
        return []
    special = set(inner.all_special_ids)
    largest = sorted((number for number in inner.get_vocab().values() if number not in special), reverse=True)[:OWN_WORDS]
    words = [word for number in largest if (word := inner.decode([number]).strip())]
    return [*words, f"{words[0]} {words[-1]} {words[0]}", f"{words[0]} {words[-1]} {words[-1]}"] if words else []


def _check_pooling(tokenize: Tokenize, tokens: Tensor, text: Mapping[str, Any], key: str) -> None:
    """Raises ValueError where the token whose output becomes the text tower's embedding is not the end token of every text."""
    pool, eos = text.get("pool_type", "argmax"), text.get("eos_id", 2)
    if pool == "argmax":
        position = tokens.argmax(1)
    elif pool == "eos":
        position = (tokens == eos).int().argmax(1)
    elif pool == "first":
        position = torch.zeros(len(tokens), dtype=torch.long)
    else:
        return
    inner: Any = getattr(tokenize, "tokenizer", None)
    end = next((known for name in ("eos_token_id", "sep_token_id") if (known := getattr(inner, name, None)) is not None), None)
    pooled = set(tokens[torch.arange(len(tokens)), position].tolist())
    if pool == "argmax" and len(pooled) > 1:
        remedy = f"set text_cfg.pool_type = 'eos' and text_cfg.eos_id = {end}" if end is not None else "give it an end token"
        raise ValueError(
            f"{key}: text_cfg.pool_type = 'argmax' takes a text's embedding at its largest token, which has to be the end's, and here is "
            f"another one in each text: {remedy}, or use a tokenizer whose end token is its last (`megakd data tokenizer` makes such)"
        )
    if pool == "eos" and not bool((tokens == eos).any(1).all()):
        raise ValueError(
            f"{key}: text_cfg.pool_type = 'eos' takes a text's embedding at token {eos} (text_cfg.eos_id), which not every text has: set "
            f"eos_id to the token that ends each text{f', {end}' if end is not None else ''}, or pool_type = 'last'"
        )
    if not text.get("no_causal_mask") and any(_is_blind(tokens[pair], position[pair]) for pair in ([1, 2], [-2, -1])):
        raise ValueError(
            f"{key}: text_cfg.pool_type = {pool!r} takes a text's embedding at a token before its last word, which that does not see in a "
            f"causal text tower: set text_cfg.pool_type = 'last', or 'eos' with an eos_id that ends texts alone"
        )


def _is_blind(tokens: Tensor, position: Tensor) -> bool:
    """Whether two texts with different last words differ only in tokens after the one at `position`."""
    different = (tokens[0] != tokens[1]).nonzero()
    return bool(different.numel()) and int(position.min()) < int(different.min())
