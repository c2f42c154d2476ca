"""Text that people wrote, as token ids in which no special token is but those that the recipe's own words mean.

"red <end> blue" is five words; taken for the end token, everything behind it would be lost to training and generation.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megakd.data.bad_samples import BadSample

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class PlainText:
    """Encodes with one tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def ids(self, text: str, quoted: Sequence[Span]) -> list[int]:
        """The ids of `text`, without what the tokenizer adds of its own. quoted: where it is a person's words and not the recipe's.

        A special token that the recipe's part spells is that token; one that touches `quoted` is tokenised letter by letter.
        Raises BadSample("bad_text") where the tokenizer cannot do so, as its vocabulary has no other way to write that word.
        """
        meant = [special for special in self._pattern.finditer(text) if not _touches(special.span(), quoted)]
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
        # its length is checked by those who ask
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split, verbose=False).input_ids
        return ids

    @functools.cached_property
    def _special_words(self) -> dict[str, int]:
        """Special tokens by what spells them. Not the one for unknown words, unless it has a second meaning."""
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


def _touches(span: Span, quoted: Sequence[Span]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in quoted)
