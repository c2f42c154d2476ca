"""Captions as tokens: one that spells a special token does not become it, and a long one is cut before it is tokenised.

CLIP's text tower reads a text at its first end token: "red <end_of_text> blue" would train as "red". 20,000 letters take it a minute.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from megakd.data.bad_samples import BadSample

Tokenize = Callable[[list[str]], torch.Tensor]
LONGEST_CAPTION = 1 << 20  # bytes
_SHORT = 512  # characters; a shorter text is never measured against the longest token


def caption(data: bytes) -> str:
    """The text without a byte-order mark. Raises BadSample: bad_text, or empty_caption where nothing is visible."""
    text = as_text(data)
    if is_blank(text):
        raise BadSample("empty_caption", "white space alone")
    return text


def as_text(data: bytes) -> str:
    """The text without a byte-order mark, blank or not. Raises BadSample, bad_text, for what is none."""
    if len(data) > LONGEST_CAPTION:
        raise BadSample("bad_text", f"{len(data)} bytes, more than {LONGEST_CAPTION}: no caption")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad_text", str(error)) from error
    if "\0" in text:
        raise BadSample("bad_text", "holds a NUL: damaged, or no UTF-8")
    return text


def is_blank(text: str) -> bool:
    """Whether nothing in it is visible."""
    return all(letter.isspace() or unicodedata.category(letter)[0] == "C" for letter in text)


def plain_captions(tokenize: Tokenize) -> Tokenize:
    """`tokenize`, but special tokens in a text are plain words and long texts are cut; all other texts give the same tokens.

    A tokenizer that names no special tokens is returned as it is.
    """
    if isinstance(tokenize, PlainCaptions) or not _specials(tokenize):
        return tokenize
    return PlainCaptions(tokenize)


class PlainCaptions:
    """See `plain_captions`; other attributes are the wrapped tokenizer's."""

    def __init__(self, tokenize: Tokenize) -> None:
        self.wrapped = tokenize

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "wrapped":  # while it is being unpickled or copied
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"wrapped": self.wrapped}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        ready = [self._spelled(self._cut(text)) for text in texts]
        tokens = self.wrapped(ready)
        # special tokens that the pattern missed, as the tokenizer cleans texts in its own way
        for row in torch.nonzero(self._broken(tokens)).flatten().tolist():
            tokens[row] = self.wrapped([_letters(ready[row])])[0]
        return tokens

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        words = sorted(_specials(self.wrapped), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, words)), re.IGNORECASE)

    def _spelled(self, text: str) -> str:
        """The text with "<end_of_text>" as "< end_of_text >", also where cleaning would make it so; as it is where it spells none."""
        cleaned = html.unescape(html.unescape(text)) if "&" in text else text
        if not cleaned.isascii():
            cleaned = unicodedata.normalize("NFKC", cleaned)
        if self._pattern.search(cleaned) is None:
            return text
        return self._pattern.sub(lambda match: f"{match[0][0]} {match[0][1:-1]} {match[0][-1]}", cleaned)

    @cached_property
    def _longest(self) -> int:
        """Characters that can matter: the longest token's for each place, doubled, as cleaning removes every second one at most."""
        inner: Any = getattr(self.wrapped, "tokenizer", self.wrapped)
        words = inner.get_vocab() if hasattr(inner, "get_vocab") else self.wrapped.encoder  # type: ignore[attr-defined]
        length = int(self.wrapped(["a"]).shape[1])
        return max(_SHORT, 2 * length * (1 + max(map(len, words))))

    def _cut(self, text: str) -> str:
        if len(text) <= _SHORT or len(text) <= self._longest:
            return text
        # cleaned as tokenizers do, or entities and blanks would count
        return " ".join(html.unescape(html.unescape(text)).split())[: self._longest]

    @cached_property
    def _frame(self) -> tuple[torch.Tensor, int, int]:
        """(ids of the special tokens but the unknown word's, how many of them begin each text, the padding's id)"""
        inner: Any = getattr(self.wrapped, "tokenizer", self.wrapped)
        ids = torch.tensor(sorted(set(inner.all_special_ids) - {getattr(inner, "unk_token_id", None)}), dtype=torch.long)
        row = self.wrapped(["a"])[0]
        plain = ~torch.isin(row, ids)
        fill = getattr(inner, "pad_token_id", None)
        return ids, int(plain.int().argmax()) if bool(plain.any()) else len(row), 0 if fill is None else int(fill)

    def _broken(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) bool: rows in which words follow a special token that does not begin the text."""
        ids, begin, fill = self._frame
        used = tokens.ne(fill).flip(1).cummax(1).values.flip(1)  # before the padding at the end
        special = torch.isin(tokens, ids)
        words = used & ~special
        last_word = torch.where(words, torch.arange(tokens.shape[1]), -1).amax(1)
        inside = special & (torch.arange(tokens.shape[1]) >= begin)
        return (inside & (torch.arange(tokens.shape[1]) < last_word[:, None])).any(1)


def _specials(tokenize: Any) -> list[str]:
    """Of open_clip's own tokenizer, or of a Hugging Face one that it holds."""
    inner = getattr(tokenize, "tokenizer", tokenize)
    tokens = getattr(inner, "all_special_tokens", None)
    if tokens is None and hasattr(inner, "decoder") and hasattr(inner, "all_special_ids"):
        tokens = [inner.decoder[number] for number in inner.all_special_ids]
    return [word for word in tokens or [] if len(word) > 2]


def _letters(text: str) -> str:
    """Letters and digits alone, which spell no special token."""
    cleaned = unicodedata.normalize("NFKC", html.unescape(html.unescape(text)))
    return "".join(letter if letter.isalnum() else " " for letter in cleaned)
