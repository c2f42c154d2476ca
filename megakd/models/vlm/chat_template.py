"""`decoder.template = "chat"`: what the tokenizer's own chat template writes around questions and answers.

The template is asked once for each number of turns, with marks in the place of what people say, so that nothing in a question can look like
a part of it, and where each question and answer stands is known exactly, also where a template has no `generation` tags to tell. It is run
by transformers, in a sandbox. No system message is given: a template that has one of its own writes it, one that knows none is not asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from megakd.recipe.vqa import CHAT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of templates that write the day, as Llama 3.2's: what a decoder is asked must not depend on it. Qwen3's begins answers with its thoughts.
VARIABLES: dict[str, str | bool] = {"date_string": "26 Jul 2024", "enable_thinking": False}
AFTER_IMAGE = "\n"  # in a user's turn, as LLaVA's conversations have it
_SPACE = "\n "


@dataclass(frozen=True)
class Script:
    """Of a conversation of n turns: `before[k]` is written before what the user says in turn k, `between[k]` from there to the answer.

    gap: white space between an answer and the token that ends it. The text from that token to the next turn's is not a part of `before`.
    """

    before: tuple[str, ...]
    between: tuple[str, ...]
    gap: str


class ChatTemplate:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        """key: of the recipe, for messages.

        Raises ValueError for a tokenizer without a chat template, and for a template that fails, writes the day, leaves out, repeats or
        moves what is said, begins an answer in training otherwise than in generation, or ends it with no token of its own.
        """
        self._tokenizer, self._key = tokenizer, f'{key} = "{CHAT}"'
        written = tokenizer.chat_template
        if not written:
            self._refuse("the tokenizer has no chat template", remedy="name a chat model, or give words: 'USER: {question} ASSISTANT: '")
        if "strftime_now" in str(written) and "date_string" not in str(written):
            self._refuse("the tokenizer's chat template writes the day, so that a decoder would be asked otherwise tomorrow")
        self.end_token = self._end()
        self.end = int(tokenizer.convert_tokens_to_ids(self.end_token))  # type: ignore[arg-type]
        self._trims = {role: self._trimmed(role) for role in ("user", "assistant")}
        self._scripts: dict[int, Script] = {}
        for turns in (1, 2):
            self.script(turns)

    def script(self, turns: int) -> Script:
        """Raises ValueError as the constructor does."""
        if turns not in self._scripts:
            self._scripts[turns] = self._made(turns)
        return self._scripts[turns]

    def said(self, role: str, text: str, *, begun: bool = False) -> str:
        """A text as the template writes it: some take away the white space around it. begun: the message has something before it."""
        left, right = self._trims[role]
        text = text.lstrip() if left and not begun else text
        return text.rstrip() if right else text

    def with_images(self, image: str) -> str:
        """Jinja of the same template for messages whose content is a list of parts, as a processor of transformers is given them.

        image: the token that stands in the place of one.
        """
        table = self._tokenizer.chat_template
        template = table["default"] if isinstance(table, dict) else table
        values = {name: str(value).lower() if isinstance(value, bool) else ascii(value) for name, value in VARIABLES.items()}
        variables = "".join(f"{{%- set {name} = {value} %}}" for name, value in values.items())
        return (
            f"{variables}{{%- set plain = namespace(messages=[]) %}}{{%- for message in messages %}}{{%- set said = namespace(text='') %}}"
            "{%- if message['content'] is string %}{%- set said.text = message['content'] %}"
            "{%- else %}{%- for part in message['content'] %}"
            f"{{%- if part['type'] == 'image' %}}{{%- set said.text = said.text + {image + AFTER_IMAGE!a} %}}"
            "{%- elif part['type'] == 'text' %}{%- set said.text = said.text + part['text'] %}{%- endif %}{%- endfor %}{%- endif %}"
            "{%- set plain.messages = plain.messages + [{'role': message['role'], 'content': said.text}] %}{%- endfor %}"
            f"{{%- set messages = plain.messages %}}{template}"
        )

    def _made(self, turns: int) -> Script:
        whole = self._rendered(turns, answered=True)
        pieces = self._pieces(whole, turns)
        asked = self._rendered(turns, answered=False)
        if not whole.removesuffix(pieces[-1]).removesuffix(_mark("assistant", turns - 1)).startswith(asked.rstrip(_SPACE)):
            self._refuse(
                f"the tokenizer's chat template begins an answer that is there otherwise than one that is to be given ({asked[-40:]!r}), "
                f"so that what is learned would not be what is asked"
            )
        before, between, gaps = [pieces[0]], list[str](), list[str]()
        for turn in range(turns):
            between.append(pieces[1 + 2 * turn])
            after = pieces[2 + 2 * turn]
            gap, _, rest = after.partition(self.end_token)
            if gap.strip() or not after.lstrip().startswith(self.end_token):
                self._refuse(f"the tokenizer's chat template ends an answer with {after[:40]!r}, and another one with {self.end_token!r}")
            gaps.append(gap)
            before.append(rest)
        if len(set(gaps)) > 1:
            self._refuse("the tokenizer's chat template writes other white space after one answer than after another")
        return Script(tuple(before[:-1]), tuple(between), gaps[0])

    def _end(self) -> str:
        """The token that follows an answer."""
        after = self._pieces(self._rendered(1, answered=True), 1)[2].lstrip()
        known = sorted({*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()}, key=len, reverse=True)
        found = next((str(token) for token in known if token and after.startswith(token)), None)
        if found is None:
            self._refuse(
                f"the tokenizer's chat template ends an answer with no token of its own ({after[:40]!r}), so that it would have no end"
            )
        return found

    def _trimmed(self, role: str) -> tuple[bool, bool]:
        """Whether white space before and after what this role says is taken away."""
        plain, spaced = (self._pieces(self._rendered(1, answered=True, around={role: space}), 1) for space in ("", _SPACE))
        place = 0 if role == "user" else 1
        return spaced[place] == plain[place], spaced[place + 1] == plain[place + 1]

    def _pieces(self, text: str, turns: int) -> list[str]:
        """What stands around the marks, which have to be there once, in order."""
        marks = [_mark(role, turn) for turn in range(turns) for role in ("user", "assistant")]
        if re.findall("|".join(map(re.escape, marks)), text) != marks:
            self._refuse("the tokenizer's chat template leaves out, repeats or moves what is said")
        return re.split("|".join(map(re.escape, marks)), text)

    def _rendered(self, turns: int, *, answered: bool, around: dict[str, str] | None = None) -> str:
        """answered: with the last answer; without it up to where one is to be given."""
        space = around or {}
        messages = [
            {"role": role, "content": f"{space.get(role, '')}{_mark(role, turn)}{space.get(role, '')}"}
            for turn in range(turns)
            for role in ("user", "assistant")
        ]
        given = messages if answered else messages[:-1]
        try:
            return str(self._tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=not answered, **VARIABLES))
        except Exception as error:  # a template raises whatever its author chose
            lines = str(error).strip().splitlines() or [""]
            self._refuse(f"the tokenizer's chat template fails on {turns} turns ({type(error).__name__}: {lines[0]})", error)

    def _refuse(self, why: str, cause: Exception | None = None, remedy: str = "name another decoder.tokenizer, or give words") -> NoReturn:
        raise ValueError(f"{self._key}: {why}; {remedy}") from cause


def _mark(role: str, turn: int) -> str:
    """Letters and digits, which no template changes."""
    return f"q{role}7w{turn}q"
