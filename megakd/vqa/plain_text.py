"""Text as token ids, with special tokens where the recipe's own words write them and nowhere else.

Taken for the end token, a question's "<end>" would hide all words behind it from training and generation.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megakd.data.bad_samples import BadSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class PlainText:
    """Encodes with one tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def ids(self, text: str, quoted: Sequence[Span]) -> list[int]:
        """The ids of `text`, without what the tokenizer adds. quoted: where it is a person's words and not the recipe's.

        A special token that touches `quoted` is tokenised as plain text. Raises BadSample("bad_text") where the vocabulary cannot do so.
        """
        meant = [
            special
            for special in self._pattern.finditer(text)
            if not any(special.start() < end and start < special.end() for start, end in quoted)
        ]
        ids_as_written = self._encoded(text, split=False)
        if sum(one in self._special for one in ids_as_written) <= len(meant):
            return ids_as_written
        ids, at = [], 0
        for special in meant:
            ids += [*self._plain(text[at : special.start()]), self._special_words[special.group()]]
            at = special.end()
        return ids + self._plain(text[at:])

    def _plain(self, text: str) -> list[int]:
        ids = self._encoded(text, split=True)
        if taken := self._special.intersection(ids):
            words = ", ".join(repr(word) for word, one in self._special_words.items() if one in taken)
            raise BadSample("bad_text", f"{text[:80]!r} spells the special token {words}, which this tokenizer cannot take for plain text")
        return ids

    def _encoded(self, text: str, *, split: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split, verbose=False).input_ids
        return ids

    @functools.cached_property
    def _special_words(self) -> dict[str, int]:
        """Special tokens by spelling, without the unknown word's unless it has a second meaning."""
        tokenizer = self.tokenizer
        words = [*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)]
        others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        known = {word: tokenizer.convert_tokens_to_ids(word) for word in words if word}
        return {word: one for word, one in known.items() if isinstance(one, int) and (one != tokenizer.unk_token_id or one in others)}

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._special_words.values())

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special_words, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
