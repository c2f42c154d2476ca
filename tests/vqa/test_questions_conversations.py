"""Prompt and answer as ids: what is learned, where the image goes, and that generation starts where training's prompt ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megakd.data.bad_samples import BadSample
from megakd.models.vlm import IGNORED
from megakd.recipe import Decoder
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.prompts import PromptEncoder, stack
from support.tokenizers import byte_pairs

P = 4


def question(*turns: tuple[str, str], short: bool = False) -> Question:
    text, answer = turns[0]
    return Question(1, "image", text, (answer,), answer, "family", {}, turns, short)


@pytest.fixture(scope="module")
def pairs() -> PreTrainedTokenizerBase:
    """Byte pairs as GPT's and Qwen's: no begin token, no padding, a space joined to the word after it, and a merge over a colon."""
    model = byte_pairs(("<|end|>",), [("y", "e"), ("ye", "s"), ("Ġ", "yes"), ("Ġ", "n"), ("Ġn", "o"), ("=", "=")])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>")


def conversations(tokenizer: PreTrainedTokenizerBase, max_length: int = 64, image_tokens: int = P, **settings: str) -> PromptEncoder:
    return PromptEncoder(tokenizer, Decoder.model_validate({"model": "any", **settings}), image_tokens, max_length)


def learned(tokenizer: PreTrainedTokenizerBase, encoded: object) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(label)) for label in encoded.labels if label != IGNORED]  # type: ignore[attr-defined]


def test_answers_and_the_end_token_are_learned_and_nothing_else(shapes: PreTrainedTokenizerBase) -> None:
    talk = conversations(shapes, template="{question} ")
    one = talk.training(question(("what colour is the star?", "blue"), ("where is the circle?", "top left")), image=True)
    assert learned(shapes, one) == ["blue", "<end>", "top", "left", "<end>"]
    assert all(label in (IGNORED, id_) for id_, label in zip(one.ids, one.labels, strict=True))
    words = shapes.convert_ids_to_tokens(one.ids)
    assert words == [
        *["<start>", *["<pad>"] * P, "what", "colour", "is", "the", "star", "?", "blue", "<end>"],
        *["where", "is", "the", "circle", "?", "top", "left", "<end>"],
    ]
    assert (one.image_start, one.image_tokens) == (1, P)


def test_the_post_processors_start_and_end_stand_at_the_ends_alone(shapes: PreTrainedTokenizerBase) -> None:
    one = conversations(shapes).training(question(("how many stars are there?", "2")), image=False)
    words = shapes.convert_ids_to_tokens(one.ids)
    assert (words.count("<start>"), words.count("<end>"), words[0], words[-1]) == (1, 1, "<start>", "<end>")
    assert one.image_tokens == 0


def test_short_answers_are_asked_for_where_the_set_has_them(shapes: PreTrainedTokenizerBase) -> None:
    talk = conversations(shapes)
    assert talk.prompt_text("what?", short=True) == "USER: what?\nAnswer the question using a single word or phrase. ASSISTANT: "
    assert talk.prompt_text("what {is} it?", short=False) == "USER: what {is} it? ASSISTANT: "
    assert talk.prompt_text("", short=True) == ""


def test_a_caption_follows_its_image_without_a_prompt(shapes: PreTrainedTokenizerBase) -> None:
    one = conversations(shapes).training(question(("", "a red circle")), image=True)
    assert shapes.convert_ids_to_tokens(one.ids) == ["<start>", *["<pad>"] * P, "a", "red", "circle", "<end>"]
    assert learned(shapes, one) == ["a", "red", "circle", "<end>"]


def test_the_space_before_an_answer_belongs_to_it(pairs: PreTrainedTokenizerBase) -> None:
    talk = conversations(pairs, template="Q: {question} A: ")
    one = talk.training(question(("is it?", "yes")), image=False)
    assert one.ids == [*pairs("Q: is it? A: yes", add_special_tokens=False).input_ids, pairs.eos_token_id]
    assert learned(pairs, one) == ["Ġyes", "<|end|>"]


def test_a_tokenizer_that_would_merge_prompt_and_answer_keeps_them_apart(pairs: PreTrainedTokenizerBase) -> None:
    talk = conversations(pairs, template="{question} =")
    one = talk.training(question(("so", "=yes")), image=False)
    assert pairs.decode(one.ids) == "so ==yes<|end|>"
    assert learned(pairs, one) == ["=", "yes", "<|end|>"]


@pytest.mark.parametrize("which", ["shapes", "pairs"])
@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("answer", ["yes", "no", "=yes", "two words"])
def test_generation_is_given_the_ids_that_stand_before_the_answer(request, which: str, image: bool, answer: str) -> None:
    talk = conversations(request.getfixturevalue(which), 200)
    asked = question(("is there a star?", answer), short=True)
    trained, prompt = talk.training(asked, image), talk.prompt(asked.text, asked.short, image)
    before = trained.labels.index(next(label for label in trained.labels if label != IGNORED))
    assert prompt.ids == trained.ids[:before]
    assert (prompt.image_start, prompt.image_tokens) == (trained.image_start, trained.image_tokens)
    assert set(prompt.labels) == {IGNORED}


def test_a_begin_token_is_there_only_where_the_tokenizer_adds_it(shapes, pairs: PreTrainedTokenizerBase) -> None:
    assert conversations(shapes).start == [shapes.bos_token_id]
    assert conversations(pairs).start == []
    unused = PreTrainedTokenizerFast(tokenizer_object=pairs.backend_tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    assert conversations(unused).start == [], "a begin token that the tokenizer knows of, but does not put first"
    assert conversations(pairs).padding == pairs.eos_token_id
    assert conversations(pairs).training(question(("", "yes")), image=True).image_start == 0


def test_turns_that_do_not_fit_are_dropped_whole(shapes: PreTrainedTokenizerBase) -> None:
    turns = [("where is the circle?", "top left")] * 5  # eight tokens each
    for length, kept in ((1 + P + 8, 1), (1 + P + 23, 2), (1 + P + 24, 3), (1 + P + 40, 5)):
        one = conversations(shapes, length, template="{question} ").training(question(*turns), image=True)
        assert learned(shapes, one) == ["top", "left", "<end>"] * kept
        assert len(one.ids) == 1 + P + 8 * kept <= length


def test_a_first_turn_that_does_not_fit_is_a_bad_sample(shapes: PreTrainedTokenizerBase) -> None:
    talk = conversations(shapes, 1 + P + 7, template="{question} ")
    with pytest.raises(BadSample, match=r"13 tokens, answers\.max_length = 12") as bad:
        talk.training(question(("where is the circle?", "top left")), image=True)
    assert bad.value.reason == "too_long"
    assert len(talk.prompt("where is the circle?", False, image=True).ids) == 10
    with pytest.raises(BadSample, match=r"15 tokens"):
        talk.prompt("where is the circle " * 2 + "and ?", False, image=True)


def test_an_empty_question_to_a_blind_decoder_without_begin_token_is_a_bad_sample(pairs: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BadSample, match="an empty question without an image"):
        conversations(pairs).prompt("", False, image=False)


def test_settings_that_leave_no_room_and_tokenizers_without_end_are_refused(pairs: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"an image becomes 64 tokens, .* may have 64 \(answers\.max_length\)"):
        conversations(pairs, 64, image_tokens=64)
    endless = PreTrainedTokenizerFast(tokenizer_object=pairs.backend_tokenizer)
    with pytest.raises(ValueError, match="has no end token"):
        conversations(endless)


def test_batches_are_padded_right_to_learn_and_left_to_answer(shapes: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    talk = conversations(shapes, template="{question} ")
    rows = [talk.training(question(("where is the circle?", "top left")), True), talk.training(question(("", "star")), False)]
    for left in (False, True):
        batch = stack(rows, talk.padding, left)
        assert batch.ids_BL.shape == batch.labels_BL.shape == (2, 13)
        for row, one in enumerate(rows):
            attend = batch.attend_BL[row]
            assert batch.ids_BL[row][attend].tolist() == one.ids
            assert batch.labels_BL[row][attend].tolist() == one.labels
            assert set(batch.labels_BL[row][~attend].tolist()) <= {IGNORED}
            assert bool(attend[-1 if left else 0])
        assert batch.image_mask_BL.sum(1).tolist() == [P, 0]
        assert batch.image_mask_BL[0].nonzero().flatten().tolist() == [1, 2, 3, 4]
    empty = stack([], 0, left=True)
    assert empty.ids_BL.shape == (0, 0)
    assert empty.ids_BL.dtype == torch.long
