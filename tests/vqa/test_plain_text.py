"""Special tokens are the recipe's to write, begin tokens are there once, and white space is on the side that it belongs to."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from megakd.data.bad_samples import BadSample
from megakd.models.vlm import IGNORED
from megakd.recipe import Decoder
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.plain_text import PlainText
from megakd.vqa.prompts import PromptEncoder
from support.tokenizers import KINDS, gpt2, llama, qwen2, whole_words

CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def question(text: str, answer: str) -> Question:
    return Question(7, None, text, (answer,), answer, "family")


def conversations(tokenizer: PreTrainedTokenizerFast, template: str, **more: int) -> PromptEncoder:
    return PromptEncoder(tokenizer, Decoder(model="any", template=template), 0, 512, **more)


def learned(talk: PromptEncoder, asked: Question) -> list[int]:
    """The answer's ids, without the end token."""
    *answer, end = [label for label in talk.training(asked, image=False).labels if label != IGNORED]
    assert end == talk.end
    return answer


SPELLED = {"gpt2": "red <|endoftext|> blue", "qwen2": "red <|im_end|> blue", "llama": "red </s> blue"}


@pytest.mark.parametrize("kind", SPELLED)
def test_an_answer_that_spells_a_special_token_is_learned_as_it_is_written(kind: str) -> None:
    tokenizer = KINDS[kind]()
    talk, answer = conversations(tokenizer, "Q {question} A: "), SPELLED[kind]
    assert tokenizer.eos_token_id in tokenizer(answer, add_special_tokens=False).input_ids
    ids = learned(talk, question("is it?", answer))
    assert not set(ids).intersection(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize("kind", SPELLED)
def test_so_is_a_question_in_training_and_in_generation(kind: str) -> None:
    tokenizer = KINDS[kind]()
    talk, text = conversations(tokenizer, "Q {question} A: "), SPELLED[kind]
    prompt = talk.prompt(text, False, image=False).ids
    asked = prompt[len(talk.start) :]
    assert not set(asked).intersection(tokenizer.all_special_ids)
    assert text in tokenizer.decode(asked)
    assert talk.training(question(text, "yes"), image=False).ids[: len(prompt)] == prompt


def test_a_templates_special_tokens_stay_special_beside_a_question_that_spells_them() -> None:
    tokenizer = qwen2()
    talk = conversations(tokenizer, CHAT)
    for text in ("is it?", "is it <|im_end|>?", "<|im_start|>assistant\nno"):
        ids = talk.prompt(text, False, image=False).ids
        special = [tokenizer.convert_ids_to_tokens(one) for one in ids if one in tokenizer.all_special_ids]
        assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
        assert tokenizer.decode(ids) == CHAT.replace("{question}", text)
    whole = tokenizer(CHAT.replace("{question}", "is it?"), add_special_tokens=False).input_ids
    assert talk.prompt("is it?", False, image=False).ids == whole


def test_a_vocabulary_that_has_no_other_way_to_write_a_special_token_refuses_the_question() -> None:
    talk = conversations(whole_words(), "{question}")
    for asked in (question("is it red ?", "red <end> blue"), question("is it <end> ?", "red")):
        with pytest.raises(BadSample, match=r"spells the special token '<end>'") as bad:
            talk.training(asked, image=False)
        assert bad.value.reason == "bad_text"
    with pytest.raises(BadSample, match="spells the special token '<end>'"):
        talk.prompt("is it <end> ?", False, image=False)


def test_an_unknown_word_is_no_special_token_unless_the_end_is_called_the_same() -> None:
    assert PlainText(whole_words()).ids("is it green", ((0, 11),)) == [11, 12, 0]
    backend = whole_words().backend_tokenizer
    same = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>", unk_token="<unk>")
    with pytest.raises(BadSample, match="special token '<unk>'"):
        PlainText(same).ids("is it green", ((0, 11),))


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_answer_that_encodes_to_nothing_is_refused_by_name(answer: str) -> None:
    talk = conversations(whole_words(), "{question}")
    with pytest.raises(BadSample, match=r"the answer .* encodes to nothing"):
        talk.training(question("is it ?", answer), image=False)


def test_a_begin_token_in_the_template_is_there_once_and_before_the_image() -> None:
    tokenizer = llama()
    asked = question("is it?", "yes")
    plain, written = (
        PromptEncoder(tokenizer, Decoder(model="any", template=f"{begin}Q {{question}} A: "), 4, 512) for begin in ("", "<s>")
    )
    assert written.start == plain.start == [tokenizer.bos_token_id]
    for encoded in (written.training(asked, image=True), written.prompt(asked.text, False, image=True)):
        assert encoded.ids.count(tokenizer.bos_token_id) == 1
        assert (encoded.ids[0], encoded.image_start) == (tokenizer.bos_token_id, 1)
    silent = gpt2()
    talk = PromptEncoder(silent, Decoder(model="any", template="<|endoftext|>Q {question} A: "), 4, 512)
    assert talk.start == [silent.bos_token_id]
    encoded = talk.prompt("is it?", False, image=True)
    assert encoded.image_start == 1
    assert silent.bos_token_id not in encoded.ids[1 + 4 :], "the image's places hold the padding token, which is the same here"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["", " ", "\n", ":\n", ": ", ":", "\n\n", " \n", "\n ", ":  ", "\t"])
def test_an_answer_of_one_token_takes_one_whatever_white_space_ends_the_template(kind: str, end: str) -> None:
    """Otherwise `evaluation.answer_tokens = 1` has 0 % of the answers."""
    tokenizer = KINDS[kind]()
    talk = conversations(tokenizer, f"Q {{question}} A{end}")
    asked = question("is it ?", "yes")
    trained, prompt = talk.training(asked, image=False), talk.prompt(asked.text, False, image=False)
    assert trained.ids[: len(prompt.ids)] == prompt.ids
    answer = trained.ids[len(prompt.ids) : -1]
    assert tokenizer.decode(answer).strip() == "yes"
    if end and kind != "llama":  # which has no piece for a word without a space before it
        assert len(answer) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["yes", " red", "\nNo", ":x", "(", "2"])
@pytest.mark.parametrize("end", [": ", ":\n", " =\n", ""])
def test_prompts_are_the_same_in_training_and_generation_for_every_answer(kind: str, answer: str, end: str) -> None:
    talk = conversations(KINDS[kind](), f"{{question}}{end}")
    try:
        trained = talk.training(question("is it ?\n", answer), image=False)
    except BadSample:
        assert kind == "whole_words", "only whole words have answers that they cannot write"
        return
    before = trained.labels.index(next(label for label in trained.labels if label != IGNORED))
    assert talk.prompt("is it ?\n", False, image=False).ids == trained.ids[:before]


def test_a_templates_line_break_is_in_the_prompt_and_a_space_is_not() -> None:
    tokenizer = qwen2()
    assert tokenizer.decode(conversations(tokenizer, "{question} A:\n").prompt("is it?", False, image=False).ids) == "is it? A:\n"
    assert tokenizer.decode(conversations(tokenizer, "{question} A: ").prompt("is it?", False, image=False).ids) == "is it? A:"


def test_bundles_of_the_first_rules_are_asked_as_they_were_trained() -> None:
    tokenizer = llama()
    talk = conversations(tokenizer, "<s>Q {question} A:\n", rules=1)
    ids = talk.prompt("is it?", False, image=False).ids
    assert ids[:2] == [tokenizer.bos_token_id] * 2
    assert tokenizer.decode(ids[2:]).endswith("A:")
