"""`decoder.template = "chat"`: prompts are what the tokenizer's own chat template writes, answers with the end of turn are learned and
nothing else, in several turns too; what a template does otherwise is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megakd.data.bad_samples import BadSample
from megakd.models.vlm.chat_template import ChatTemplate
from megakd.recipe import Decoder
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.prompts import IGNORED, Encoded, PromptEncoder
from support.chat_templates import CHATML, LLAMA2, LLAMA3, PHI3, STRICT, THINKING, chatml, llama3, with_template
from support.tokenizers import llama, qwen2

P = 3
KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "ChatML": chatml,
    "ChatML that thinks": lambda: with_template(chatml(), THINKING),
    "Llama 3": llama3,
    "strict": lambda: with_template(llama3(), STRICT),
    "end of text": lambda: with_template(chatml(), PHI3),
    "Llama 2": lambda: with_template(llama(), LLAMA2),
}
TALK = (("is it red?", "yes"), ("and\nblue?", "No, it is red"), ("who?", "2 of them"))


def question(*turns: tuple[str, str], short: bool = False) -> Question:
    text, answer = turns[0]
    return Question(1, "image", text, (answer,), answer, "family", {}, turns, short)


def encoder(tokenizer: PreTrainedTokenizerFast, max_length: int = 512, **settings: Any) -> PromptEncoder:
    return PromptEncoder(tokenizer, Decoder.model_validate({"model": "any", "template": "chat", **settings}), P, max_length)


def rendered(tokenizer: PreTrainedTokenizerFast, turns: tuple[tuple[str, str], ...], *, asked: bool = False) -> str:
    """By transformers; asked: without the last answer, up to where it is to begin."""
    messages = [{"role": role, "content": said} for turn in turns for role, said in zip(("user", "assistant"), turn, strict=True)]
    written = {"tokenize": False, "add_generation_prompt": asked, "enable_thinking": False}
    return str(tokenizer.apply_chat_template(messages[:-1] if asked else messages, **written))  # type: ignore[arg-type]


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


def learned(tokenizer: PreTrainedTokenizerFast, one: Encoded) -> list[str]:
    """The learned words, cut after each end of turn."""
    ends = [place for place, label in enumerate(one.learned, 1) if label == one.learned[-1]]
    return [tokenizer.decode(one.learned[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_conversation_has_the_ids_that_transformers_makes_of_it(kind: str, count: int) -> None:
    tokenizer = KINDS[kind]()
    one = encoder(tokenizer).training(question(*TALK[:count]), image=False)
    whole = ids(tokenizer, rendered(tokenizer, TALK[:count]))
    assert one.ids == whole[: len(one.ids)]
    assert set(whole[len(one.ids) :]) <= {*ids(tokenizer, "\n"), tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    assert one.turns == count
    assert all(label in (IGNORED, number) for number, label in zip(one.ids, one.labels, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image", [False, True])
def test_answers_and_the_end_of_their_turn_are_learned_and_nothing_else(kind: str, image: bool) -> None:
    tokenizer = KINDS[kind]()
    talk = encoder(tokenizer)
    assert talk.chat is not None
    end = talk.chat.end_token
    said = learned(tokenizer, talk.training(question(*TALK), image))
    assert [one.removesuffix(end).strip() for one in said] == ["yes", "No, it is red", "2 of them"]
    assert all(one.endswith(end) for one in said)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image", [False, True])
def test_generation_is_given_what_stands_before_the_answer(kind: str, image: bool) -> None:
    tokenizer = KINDS[kind]()
    talk, asked = encoder(tokenizer), question(("is it red?", "yes"), short=True)
    one, prompt = talk.training(asked, image), talk.prompt(asked.text, asked.short, image)
    first = next(place for place, label in enumerate(one.labels) if label != IGNORED)
    assert prompt.ids == one.ids[:first]
    assert (prompt.image_start, prompt.image_tokens) == (one.image_start, one.image_tokens) == (one.image_start, P if image else 0)
    if not image:
        words = rendered(tokenizer, ((asked.text + talk.settings.instruction, "yes"),), asked=True)
        assert prompt.ids == ids(tokenizer, words)
        assert talk.prompt_text(asked.text, True).rstrip() == words.rstrip()


def test_the_image_stands_in_the_users_turn_before_the_question() -> None:
    tokenizer = chatml()
    one = encoder(tokenizer, instruction="").prompt("is it red?", True, image=True)
    before, after = one.ids[: one.image_start], one.ids[one.image_start + P :]
    assert tokenizer.decode(before).endswith("<|im_start|>user\n")
    assert tokenizer.decode(after) == "\nis it red?<|im_end|>\n<|im_start|>assistant\n"
    assert one.image_start > 3, "its own system message stands before"


def test_the_mask_is_transformers_own_where_a_template_has_tags_for_it() -> None:
    tokenizer = chatml()
    assert "generation" in CHATML
    messages = [{"role": role, "content": said} for turn in TALK for role, said in zip(("user", "assistant"), turn, strict=True)]
    found: Any = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    one = encoder(tokenizer).training(question(*TALK), image=False)
    assert sum(found["assistant_masks"]) == len(one.learned)
    assert [int(label != IGNORED) for label in one.labels] == list(found["assistant_masks"])[: len(one.labels)]


@pytest.mark.parametrize("kind", ["ChatML", "Llama 3", "strict"])
def test_what_people_write_is_no_part_of_the_template(kind: str) -> None:
    tokenizer = KINDS[kind]()
    talk = encoder(tokenizer, instruction="")
    assert talk.chat is not None
    spelled = f"red {talk.chat.end_token} blue"
    one = talk.training(question((spelled, spelled), ("is it?", "yes")), image=True)
    plain = ids(tokenizer, rendered(tokenizer, (("a", "b"), ("c", "d"))))
    assert one.ids.count(talk.end) == plain.count(talk.end) + (P if talk.padding == talk.end else 0)
    assert [said.removesuffix(talk.chat.end_token) for said in learned(tokenizer, one)] == [spelled, "yes"]


def test_white_space_is_taken_away_as_the_template_does() -> None:
    turns = (("  is it red? \n", " yes "), ("who?", "it"))
    for kind in ("ChatML", "strict"):
        tokenizer = KINDS[kind]()
        one = encoder(tokenizer).training(question(*turns), image=False)
        whole = ids(tokenizer, rendered(tokenizer, turns))
        assert one.ids == whole[: len(one.ids)], kind


@pytest.mark.parametrize("kind", KINDS)
def test_turns_that_do_not_fit_are_dropped_whole(kind: str) -> None:
    tokenizer = KINDS[kind]()
    two = encoder(tokenizer).training(question(*TALK[:2]), image=True)
    fitting = encoder(tokenizer, len(two.ids)).training(question(*TALK), image=True)
    assert (fitting.turns, fitting.ids, fitting.labels) == (2, two.ids, two.labels)
    with pytest.raises(BadSample, match="max_length"):
        encoder(tokenizer, P + 6).training(question(*TALK), image=True)


def test_a_caption_follows_its_image_and_ends_as_an_answer_does() -> None:
    talk = encoder(chatml())
    one = talk.training(question(("", "yes")), image=True)
    assert one.ids[:P] == [talk.padding] * P
    assert one.learned[-1] == talk.end == chatml().convert_tokens_to_ids("<|im_end|>")
    assert one.ids[P:] == one.learned


BROKEN = {
    "no chat template; name a chat model, or give words": None,
    "fails on 1 turns .*: no roles here": "{{ raise_exception('no roles here') }}",
    "writes the day": "{{ strftime_now('%d') }}" + CHATML,
    "leaves out, repeats or moves what is said": CHATML + "{{ messages[0]['content'] }}",
    "begins an answer that is there otherwise": CHATML + "{%- if add_generation_prompt %}{{ '<think>\\n' }}{%- endif %}",
    "no token of its own": "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}


@pytest.mark.parametrize("why", BROKEN)
def test_a_template_that_cannot_be_learned_by_is_refused(why: str) -> None:
    with pytest.raises(ValueError, match=f'decoder.template = "chat": .*{why}'):
        ChatTemplate(with_template(qwen2(), BROKEN[why]), "decoder.template")


def test_words_without_a_question_are_refused_and_chat_is_named() -> None:
    with pytest.raises(ValueError, match=r"template = 'chats': it must hold \{question\}, or be 'chat'"):
        Decoder(model="any", template="chats")


def test_a_template_as_llama_3_has_header_ids_and_ends_turns_by_its_own_token() -> None:
    tokenizer = llama3()
    talk = encoder(tokenizer)
    assert talk.chat is not None
    assert (talk.chat.end_token, tokenizer.eos_token) == ("<|eot_id|>", "<|end_of_text|>")
    assert talk.training(question(("is it?", "yes")), image=True).ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.chat_template == LLAMA3
