"""From a question to token ids: the one prompt that training, evaluation and `megakd answer` share.

    [BOS] [P image tokens] prompt answer EOS prompt answer EOS ...

The prompt is `decoder.template` with the question in it, followed for short answers by `decoder.instruction`. An empty question has
no prompt: the answer follows the image, as in LLaVA's "plain" first stage, where a caption does. Labels are the answers and the end
token after each; everything else is -100.

Prompt and answer meet at one place in the ids, the same in training and in generation, whatever the tokenizer. The prompt is
tokenised without the white space at its end, which belongs to the answer: byte-pair vocabularies have " yes", and a lone " " before
"yes" is a sequence they never saw. The answer's ids are what it adds to those of the prompt; where the tokenizer would merge the
two, so that the prompt's ids change, it is tokenised alone.

Legend: B questions of a local batch, L tokens of a conversation, P image tokens of one image.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from megakd.data.bad import BadSample
from megakd.data.questions import Question
from megakd.recipe import Decoder

IGNORED = -100


class Encoded(NamedTuple):
    """One conversation: L ids, L labels (-100: not learned), and how many of the ids, from `image_start` on, are image places."""

    ids: list[int]
    labels: list[int]
    image_start: int
    image_tokens: int


class Stacked(NamedTuple):
    """A batch of conversations, each (B, L): int64 ids and labels, bool attend (False: padding) and image_mask."""

    ids_BL: torch.Tensor
    attend_BL: torch.Tensor
    image_mask_BL: torch.Tensor
    labels_BL: torch.Tensor


@dataclass(frozen=True, eq=False)
class Conversations:
    """Encodes questions for one decoder.

    tokenizer: with an end token; the begin token is put first if the tokenizer itself would. settings: the prompt's words.
    image_tokens: P, 0 for a decoder without eyes. max_length: most tokens of a conversation, image tokens included.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: Decoder
    image_tokens: int
    max_length: int

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the decoder's tokenizer has no end token, so that answers would have no end: name another decoder.tokenizer")
        if self.image_tokens >= self.max_length:
            raise ValueError(
                f"an image becomes {self.image_tokens} tokens, and a conversation may have {self.max_length} (answers.max_length): "
                f"raise that, or lower decoder.image_tokens"
            )

    @functools.cached_property
    def start(self) -> list[int]:
        """The begin token where the tokenizer adds it of its own (Llama's does, Qwen2's has none)."""
        begin = self.tokenizer.bos_token_id
        return [begin] if begin is not None and self.tokenizer("a").input_ids[:1] == [begin] else []

    @property
    def end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def padding(self) -> int:
        """Any id will do, as nothing attends to it; Llama's tokenizer has no padding token."""
        pad = self.tokenizer.pad_token_id
        return self.end if pad is None else int(pad)

    def training(self, question: Question, image: bool) -> Encoded:
        """The conversation with its answers, as many whole turns as fit.

        Raises BadSample("too_long") when not even the first turn does: an answer that is cut off teaches to break off.
        """
        ids = self._head(image)
        start, labels = len(ids) - self._places(image), [IGNORED] * len(ids)
        for turn, (text, answer) in enumerate(question.conversation):
            prompt = self.prompt_text(text, question.short)
            asked, answered = self._ids(prompt.rstrip()), self._answer(prompt, answer)
            if len(ids) + len(asked) + len(answered) > self.max_length:
                if turn == 0:
                    raise self._too_long(len(ids) + len(asked) + len(answered))
                break
            ids += asked + answered
            labels += [IGNORED] * len(asked) + answered
        return Encoded(ids, labels, start, self._places(image))

    def prompt(self, text: str, short: bool, image: bool) -> Encoded:
        """What the decoder is given to answer: the same ids that stand before the answer in training; nothing is labelled.

        Raises BadSample: too_long, or bad_text for an empty question without image and begin token, which is nothing to go on from.
        """
        ids = self._head(image)
        start = len(ids) - self._places(image)
        ids += self._ids(self.prompt_text(text, short).rstrip())
        if len(ids) > self.max_length:
            raise self._too_long(len(ids))
        if not ids:
            raise BadSample("bad_text", "an empty question without an image")
        return Encoded(ids, [IGNORED] * len(ids), start, self._places(image))

    def prompt_text(self, text: str, short: bool) -> str:
        """The prompt in words, up to where the answer begins; "" for an empty question."""
        if not text:
            return ""
        # not str.format: a question may hold braces
        return self.settings.template.replace("{question}", text + self.settings.instruction if short else text)

    def _head(self, image: bool) -> list[int]:
        return self.start + [self.padding] * self._places(image)

    def _places(self, image: bool) -> int:
        return self.image_tokens if image else 0

    def _answer(self, prompt: str, answer: str) -> list[int]:
        stem = prompt.rstrip()
        asked, whole = self._ids(stem), self._ids(stem + prompt[len(stem) :] + answer)
        return [*(whole[len(asked) :] if whole[: len(asked)] == asked else self._ids(answer)), self.end]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # its length is checked here
        return ids

    def _too_long(self, tokens: int) -> BadSample:
        return BadSample("too_long", f"{tokens} tokens, answers.max_length = {self.max_length}")


def stack(encoded: Sequence[Encoded], padding: int, left: bool) -> Stacked:
    """The conversations as one batch, as long as the longest. left: prompts to go on from end in the last column."""
    length = max((len(one.ids) for one in encoded), default=0)
    shape = (len(encoded), length)
    ids, labels = torch.full(shape, padding, dtype=torch.long), torch.full(shape, IGNORED, dtype=torch.long)
    attend, image = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, one in enumerate(encoded):
        first = length - len(one.ids) if left else 0
        here: Any = slice(first, first + len(one.ids))
        ids[row, here], labels[row, here], attend[row, here] = torch.tensor(one.ids), torch.tensor(one.labels), True
        image[row, first + one.image_start : first + one.image_start + one.image_tokens] = True
    return Stacked(ids, attend, image, labels)
