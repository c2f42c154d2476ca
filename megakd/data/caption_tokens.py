"""Texts that mean what they say: a caption that spells a tokenizer's special token does not become it, and a long one is cut in time.

CLIP's text tower reads a text at its first end token, so that "red <end_of_text> blue" would train as "red"; a word of 20,000 letters
takes its tokenizer a minute.
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
# A million letters are no caption; a tokenizer would take seconds for them.
_LONGEST_CAPTION = 1 << 20
# A shorter text is never measured against the longest token.
_SHORT = 512


def caption(data: bytes) -> str:
    """The caption as it is stored, without a byte-order mark. Raises BadSample: bad_text, or empty_caption for nothing to be seen."""
    if len(data) > _LONGEST_CAPTION:
        raise BadSample("bad_text", f"{len(data)} bytes, more than {_LONGEST_CAPTION}: no caption")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad_text", str(error)) from error
    if "\0" in text:
        raise BadSample("bad_text", "holds a NUL: damaged, or no UTF-8")
    # white space, and signs that control or format
    if all(letter.isspace() or unicodedata.category(letter)[0] == "C" for letter in text):
        raise BadSample("empty_caption", "white space alone")
    return text


def plain_captions(tokenize: Tokenize) -> Tokenize:
    """`tokenize` that takes special tokens in a text for the letters that spell them, and cuts texts where no token can matter any more.

    All other texts give the same tokens. A tokenizer that names no special tokens is returned as it is.
    """
    if isinstance(tokenize, PlainCaptions) or not _specials(tokenize):
        return tokenize
    return PlainCaptions(tokenize)


class PlainCaptions:
    """See `plain_captions`. Attributes are those of the tokenizer it wraps."""

    def __init__(self, tokenize: Tokenize) -> None:
        self.wrapped = tokenize

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "wrapped":  # while it is being unpickled or copied
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"wrapped": self.wrapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        ready = [self._spelled(self._cut(text)) for text in texts]
        tokens = self.wrapped(ready)
        # what the pattern did not see, since the tokenizer cleans texts in its own way
        for row in torch.nonzero(self._broken(tokens)).flatten().tolist():
            tokens[row] = self.wrapped([_letters(ready[row])])[0]
        return tokens

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        words = sorted(_specials(self.wrapped), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, words)), re.IGNORECASE)

    def _spelled(self, text: str) -> str:
        """A text with spaces in what spells a special token, in letters or in what cleaning makes of them."""
        read = text
        if "&" in read:
            read = html.unescape(html.unescape(read))
        if not read.isascii():
            read = unicodedata.normalize("NFKC", read)
        if self._pattern.search(read) is None:
            return text
        # the space goes behind the first sign and before the last: "< end_of_text >", of which the rest is the same words
        return self._pattern.sub(lambda match: f"{match[0][0]} {match[0][1:-1]} {match[0][-1]}", read)

    @cached_property
    def _longest(self) -> int:
        """Characters that decide on the tokens: a token has at most so many letters, and cleaning takes at most every second one away."""
        inner: Any = getattr(self.wrapped, "tokenizer", self.wrapped)
        words = inner.get_vocab() if hasattr(inner, "get_vocab") else self.wrapped.encoder  # type: ignore[attr-defined]
        length = int(self.wrapped(["a"]).shape[1])
        return max(_SHORT, 2 * length * (1 + max(map(len, words))))

    def _cut(self, text: str) -> str:
        if len(text) <= _SHORT:
            return text
        if len(text) <= self._longest:
            return text
        # as the tokenizers' own cleaning does, or entities and blanks would count
        return " ".join(html.unescape(html.unescape(text)).split())[: self._longest]

    @cached_property
    def _frame(self) -> tuple[torch.Tensor, int, int]:
        """The special tokens but those for unknown words, how many begin each text, and what fills it up."""
        inner: Any = getattr(self.wrapped, "tokenizer", self.wrapped)
        ids = torch.tensor(sorted(set(inner.all_special_ids) - {getattr(inner, "unk_token_id", None)}), dtype=torch.long)
        row = self.wrapped(["a"])[0]
        plain = ~torch.isin(row, ids)
        fill = getattr(inner, "pad_token_id", None)
        return ids, int(plain.int().argmax()) if bool(plain.any()) else len(row), 0 if fill is None else int(fill)

    def _broken(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n,) bool: rows in which words follow a special token that does not begin the text."""
        ids, begin, fill = self._frame
        used = tokens.ne(fill).flip(1).cummax(1).values.flip(1)  # what comes before the filling at the end
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
    """Its letters and digits alone: no special token is spelled so."""
    read = unicodedata.normalize("NFKC", html.unescape(html.unescape(text)))
    return "".join(letter if letter.isalnum() else " " for letter in read)
