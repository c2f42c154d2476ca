"""From a question to token ids: the one prompt that training, evaluation and `megakd answer` share.

    [BOS] [P image tokens] prompt answer EOS prompt answer EOS ...

The prompt is `decoder.template` with the question in it, for short answers with `decoder.instruction`. An empty question has no prompt:
the answer follows the image, as a caption does in LLaVA's "plain" first stage. Labels are the answers and the end token after each;
everything else is -100.

Prompt and answer meet at the same place in the ids in training and in generation. White space at the prompt's end that the tokenizer joins
to the next word is the answer's: byte-pair vocabularies have " yes", and never saw a lone " " before "yes"; other white space, a line break
after "ASSISTANT:", is the prompt's. The answer's ids are those it adds to the prompt's; where they would change the prompt's, it is
tokenised alone.

With `decoder.template = "chat"` it is the tokenizer's chat template that writes turns, and the image tokens stand in the first one of the
user, before a line break and the question:

    opening of the user's turn [P image tokens] question ... answer END opening of the user's turn question ... answer END

END is the token by which that template ends an answer. A caption follows its image without a template all the same.

Only the template writes special tokens. In a question or an answer they are plain text, or the question is a bad sample where the tokenizer
cannot write them so. A begin token at the template's start is the conversation's own, and there once.

Legend: B questions of a local batch, L tokens of a conversation, P image tokens of one image.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megakd.data.bad_samples import BadSample
from megakd.models.vlm import IGNORED
from megakd.models.vlm.chat_template import AFTER_IMAGE, ChatTemplate
from megakd.recipe import Decoder
from megakd.recipe.vqa import CHAT
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.plain_text import PlainText, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How prompts become ids. 2: as above. 1, of bundles that say nothing else: all white space at the prompt's end is the answer's, and a begin
# token of the template stands beside the tokenizer's own.
RULES = 2
# Answers of several kinds, as a vocabulary may join white space to some alone.
_ANSWERS = ("yes", "No", "2", "a", "the", "red", "It", "one")
_CHARACTERS = 200  # of a token, on average: no language has as many
_TAIL = 12  # characters before white space that may change how it is tokenised


class SilentAnswer(BadSample):
    """An answer that encodes to nothing but its end token."""


class Encoded(NamedTuple):
    """One conversation: L ids, L labels (-100: not learned); `image_tokens` of the ids, from `image_start` on, are image places.

    turns: of the conversation's, how many are in it with their answers.
    """

    ids: list[int]
    labels: list[int]
    image_start: int
    image_tokens: int
    turns: int = 0

    @property
    def learned(self) -> list[int]:
        """The ids of all answers, with the end token after each."""
        return [label for label in self.labels if label != IGNORED]


class Stacked(NamedTuple):
    """A batch of conversations, each (B, L): int64 ids and labels, bool attend (False: padding) and image_mask."""

    ids_BL: torch.Tensor
    attend_BL: torch.Tensor
    image_mask_BL: torch.Tensor
    labels_BL: torch.Tensor


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """Encodes questions for one decoder.

    tokenizer: with an end token. settings: the prompt's words. image_tokens: P, 0 without images. max_length: tokens of a conversation,
    image tokens included; limit: whose number that is, for messages. rules: see RULES.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: Decoder
    image_tokens: int
    max_length: int
    rules: int = RULES
    limit: str = "answers.max_length"
    _answers_part: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the decoder's tokenizer has no end token, so that answers would have no end: name another decoder.tokenizer")
        if self.image_tokens >= self.max_length:
            raise ValueError(
                f"an image becomes {self.image_tokens} tokens, and a conversation may have {self.max_length} ({self.limit}): "
                f"raise that, or lower decoder.image_tokens"
            )

    @functools.cached_property
    def start(self) -> list[int]:
        """The begin token, where the tokenizer adds it (Llama's does, Qwen2's has none) or the template starts with it."""
        begin = self.tokenizer.bos_token_id
        if begin is None:
            return []
        own = self.tokenizer("a").input_ids[:1] == [begin]
        template = self.settings.template if self.chat is None else self.chat.script(1).before[0]
        written = self.rules > 1 and self._words.ids(template, ())[:1] == [begin]
        return [begin] if own or written else []

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id) if self.chat is None else self.chat.end

    @functools.cached_property
    def chat(self) -> ChatTemplate | None:
        return ChatTemplate(self.tokenizer, "decoder.template") if self.settings.template == CHAT else None

    @property
    def written(self) -> str:
        """The template, in words or as the tokenizer has it: what prompts depend on."""
        return self.settings.template if self.chat is None else f"{CHAT}: {self.tokenizer.chat_template}"

    @property
    def padding(self) -> int:
        """Any id, as nothing attends to it; Llama's tokenizer has no padding token."""
        pad = self.tokenizer.pad_token_id
        return self.end if pad is None else int(pad)

    def training(self, question: Question, image: bool) -> Encoded:
        """The conversation with its answers, as many whole turns as fit.

        Raises BadSample: too_long when the first turn does not fit, as an answer that is cut off teaches to break off; bad_text for an
        answer that encodes to nothing, and for text that the tokenizer takes for a special token.
        """
        turns = len(question.conversation)
        encoded = self._conversation(question, turns, image)
        while encoded.turns < turns:  # a chat template may write fewer turns otherwise
            turns = encoded.turns
            encoded = self._conversation(question, turns, image)
        return encoded

    def _conversation(self, question: Question, turns: int, image: bool) -> Encoded:
        """The first `turns` turns, as many as fit."""
        opening, places = self._head(image, question.text)
        ids, labels, kept = [*opening], [IGNORED] * len(opening), 0
        for turn, (text, answer) in enumerate(question.conversation[:turns]):
            try:
                self._check_characters(len(text) + len(answer))
                prompt, spans = self._asked(text, question.short, turn, turns, image)
                prompt_ids, answer_ids = self._answered(prompt, spans, self._said(text, answer, turns))
                prompt_ids = self._without_begin(prompt_ids, text) if turn == 0 else prompt_ids
                self._check_length(len(ids) + len(prompt_ids) + len(answer_ids))
            except BadSample as bad:
                if turn and bad.reason == "too_long":
                    break
                raise
            ids += prompt_ids + answer_ids
            labels += [IGNORED] * len(prompt_ids) + answer_ids
            kept += 1
        return Encoded(ids, labels, len(opening) - places, places, kept)

    def taught(self, question: Question, learned: Encoded, image: bool) -> Encoded:
        """The conversation as this decoder, a teacher, is given it: its own prompts and image places, the turns and answers of `learned`.

        learned: what the student's encoder made of the question. The k-th answer token of both is the same one, at another place.
        Raises BadSample where the answers' ids differ: too_long where not all turns fit; bad_text where one prompt's white space or last
        word joins the answer and the other's does not.
        """
        own = self.training(dataclasses.replace(question, turns=question.conversation[: learned.turns]), image)
        if own.turns < learned.turns:
            raise BadSample("too_long", f"{learned.turns} turns, of which {own.turns} fit: {self.limit} = {self.max_length} tokens")
        if own.learned != learned.learned:
            raise BadSample(
                "bad_text",
                f"the answer is {learned.learned[:8]} after decoder.template, and {own.learned[:8]} after the teacher's, "
                f"{self.settings.template!r}",
            )
        return own

    def prompt(self, text: str, short: bool, image: bool) -> Encoded:
        """The ids that stand before the answer in training; nothing is labelled.

        Raises BadSample: too_long; bad_text for text that the tokenizer takes for a special token, and for an empty question without image
        and begin token.
        """
        opening, places = self._head(image, text)
        self._check_characters(len(text))
        ids = opening + self._without_begin(self._prompt_ids(*self._asked(text, short, 0, 1, image)), text)
        self._check_length(len(ids))
        if not ids:
            raise BadSample("bad_text", "an empty question without an image")
        return Encoded(ids, [IGNORED] * len(ids), len(opening) - places, places)

    def prompt_text(self, text: str, short: bool) -> str:
        """The prompt in words, up to where the answer begins, about no image; "" for an empty question."""
        return self._asked(text, short, 0, 1, image=False)[0]

    def _asked(self, text: str, short: bool, turn: int, turns: int, image: bool) -> tuple[str, tuple[Span, ...]]:
        """(words of the turn's prompt, where the question's own stand in them). What stands before an image is `_head`'s."""
        if not text:
            return "", ()
        if self.chat is None:
            # not str.format: a question may hold braces
            prompt = self.settings.template.replace("{question}", text + self.settings.instruction if short else text)
            return prompt, self._spans(text, short)
        script = self.chat.script(turns)
        seen = image and turn == 0
        before = AFTER_IMAGE if seen else script.before[turn]
        words = self.chat.said("user", text + self.settings.instruction if short else text, begun=seen)
        return before + words + script.between[turn], ((len(before), len(before) + len(words)),)

    def _said(self, text: str, answer: str, turns: int) -> str:
        """The answer as it is learned, up to the token that ends it."""
        if self.chat is None or not text:
            return answer
        return self.chat.said("assistant", answer) + self.chat.script(turns).gap

    def _prompt_ids(self, prompt: str, spans: tuple[Span, ...]) -> list[int]:
        """The prompt's ids, with the white space at its end that is not the answer's."""
        bare = prompt.rstrip()
        spaces = prompt[len(bare) :]
        if not spaces or self.rules == 1:
            return self._words.ids(bare, spans)
        tail = bare[-_TAIL:] + spaces
        if tail not in self._answers_part:
            self._answers_part[tail] = self._tokens_of_an_answer(tail)
        with_answer = self._words.ids(prompt + _ANSWERS[0], spans)
        return with_answer[: -self._answers_part[tail]]

    def _tokens_of_an_answer(self, tail: str) -> int:
        """How many tokens of `tail` + _ANSWERS[0] depend on the answer; at least 1, as all answers may be one unknown token."""
        rows = [self._words.ids(tail + answer, ()) for answer in _ANSWERS]
        most = min(map(len, rows)) - 1
        shared = next((place for place in range(most) if len({row[place] for row in rows}) > 1), most)
        return len(rows[0]) - shared

    def _answered(self, prompt: str, spans: tuple[Span, ...], answer: str) -> tuple[list[int], list[int]]:
        """(ids of the prompt, ids of the answer with its end token)"""
        prompt_ids = self._prompt_ids(prompt, spans)
        with_answer = self._words.ids(prompt + answer, (*spans, (len(prompt), len(prompt) + len(answer))))
        answer_ids = with_answer[len(prompt_ids) :] if with_answer[: len(prompt_ids)] == prompt_ids else []
        if not self.says(answer_ids):  # prompt and answer became one word
            answer_ids = self._words.ids(answer, ((0, len(answer)),))
        if not answer_ids:
            raise SilentAnswer("bad_text", f"the answer {answer[:80]!r} encodes to nothing")
        return prompt_ids, [*answer_ids, self.end]

    def says(self, ids: Sequence[int]) -> bool:
        """Whether an answer's ids hold more than unknown words, which are decoded to nothing."""
        return bool(set(ids) - {self.tokenizer.unk_token_id})

    def _without_begin(self, prompt_ids: list[int], text: str) -> list[int]:
        """The ids of a first prompt, whose begin token stands before the image, where a chat template has not written it there."""
        if self.chat is not None and text:
            return prompt_ids
        return prompt_ids[1:] if self.rules > 1 and self.start and prompt_ids[:1] == self.start else prompt_ids

    def _spans(self, text: str, short: bool) -> tuple[Span, ...]:
        """Where the question's own words stand in the prompt."""
        parts, at, spans = self.settings.template.split("{question}"), 0, []
        for part in parts[:-1] if text else ():
            at += len(part)
            spans.append((at, at + len(text)))
            at += len(text) + (len(self.settings.instruction) if short else 0)
        return tuple(spans)

    @functools.cached_property
    def _words(self) -> PlainText:
        return PlainText(self.tokenizer)

    def _head(self, image: bool, text: str) -> tuple[list[int], int]:
        """(ids before and of the image, how many of them are the image's). text: of the first question."""
        places = self.image_tokens if image else 0
        if self.chat is None or not text:
            return self.start + [self.padding] * places, places
        return (self._words.ids(self.chat.script(1).before[0], ()) if image else []) + [self.padding] * places, places

    def _check_characters(self, characters: int) -> None:
        """Before a text is tokenised, as megabytes take a minute."""
        if characters > self.max_length * _CHARACTERS:
            raise BadSample("too_long", f"{characters} characters, {self.limit} = {self.max_length} tokens")

    def _check_length(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise BadSample("too_long", f"{tokens} tokens, {self.limit} = {self.max_length}")


def stack(encoded: Sequence[Encoded], padding: int, left: bool) -> Stacked:
    """The conversations as one batch, as long as the longest. left: padded there, so that prompts end in the last column."""
    length = max((len(one.ids) for one in encoded), default=0)
    shape = (len(encoded), length)
    ids, labels = torch.full(shape, padding, dtype=torch.long), torch.full(shape, IGNORED, dtype=torch.long)
    attend, image = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, one in enumerate(encoded):
        first = length - len(one.ids) if left else 0
        span: Any = slice(first, first + len(one.ids))
        ids[row, span], labels[row, span], attend[row, span] = torch.tensor(one.ids), torch.tensor(one.labels), True
        image[row, first + one.image_start : first + one.image_start + one.image_tokens] = True
    return Stacked(ids, attend, image, labels)
