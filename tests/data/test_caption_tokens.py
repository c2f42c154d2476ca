"""Captions as they are written: special tokens spelled out stay text, for open_clip's tokenizer and Hugging Face ones; long ones end."""

import pickle
import time
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megakd.data.bad_samples import BadSample
from megakd.data.caption_tokens import PlainCaptions, caption, plain_captions
from megakd.data.transforms import TowerView

WORDS = ["red", "blue", "end", "of", "text", "s", "sep", "pad", "mask", "unk", "cls", "a", "picture", "<", ">", "/", "[", "]", "|", "_"]
SPECIALS = {
    "word": ("<start>", "<end>", "<pad>", "<unk>"),
    "piece": ("[CLS]", "[SEP]", "[PAD]", "[UNK]"),
    "bpe": ("<s>", "</s>", "<pad>", "<unk>"),
}
PLAIN = ["a red picture", "blue!", "", "of <of> text", "a < b > c & d", "naïve façade — “東京”", "red " * 300]


def _hugging_face(folder: Path, kind: str) -> HFTokenizer:
    begin, end, pad, unknown = SPECIALS[kind]
    if kind == "word":
        vocabulary = {word: number for number, word in enumerate([pad, unknown, begin, end, *WORDS])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        inner = Tokenizer(models.WordPiece(unk_token=unknown) if kind == "piece" else models.BPE(unk_token=unknown))
        inner.normalizer = normalizers.BertNormalizer(lowercase=True) if kind == "piece" else normalizers.NFKC()
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if kind == "piece" else pre_tokenizers.Metaspace()
        trainer = trainers.WordPieceTrainer if kind == "piece" else trainers.BpeTrainer
        inner.train_from_iterator([" ".join(WORDS)] * 20, trainer(vocab_size=300, special_tokens=[pad, unknown, begin, end]))
    ids = [(begin, inner.token_to_id(begin)), (end, inner.token_to_id(end))]
    inner.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=ids)
    names = {"bos_token": begin, "eos_token": end} if kind != "piece" else {"cls_token": begin, "sep_token": end, "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, unk_token=unknown, **names).save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=24)


@pytest.fixture(scope="module", params=["simple", "word", "piece", "bpe"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    if request.param == "simple":
        return open_clip.SimpleTokenizer(context_length=24)
    return _hugging_face(tmp_path_factory.mktemp(request.param), request.param)


def specials(tokenizer) -> list[str]:
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    return inner.all_special_tokens if hasattr(inner, "all_special_tokens") else ["<start_of_text>", "<end_of_text>"]


def content(tokenizer, text: str) -> list[int]:
    """The tokens of a text between those that frame it."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    unknown = getattr(inner, "unk_token_id", None)
    row = tokenizer([text])[0].tolist()
    fill = getattr(inner, "pad_token_id", 0)
    while row and row[-1] == fill:
        row.pop()
    return [token for token in row[1:-1] if token == unknown or token not in inner.all_special_ids], row


def test_a_special_token_in_a_caption_is_text_and_what_follows_it_is_read(tokenizer) -> None:
    plain = plain_captions(tokenizer)
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    blue = content(tokenizer, "blue")[0]
    for word in specials(tokenizer):
        for form in ("red {} blue", "{} blue", "red{}blue blue", "red {} {} blue"):
            for spelled in (word, word.upper(), word.replace("<", "&lt;").replace(">", "&gt;"), word.replace("<", "&amp;lt;")):
                words, row = content(plain, form.format(*[spelled] * 2))
                assert words[-len(blue) :] == blue, (word, form, row)
                assert len(row) - 2 == len(words), (word, form, row)
    assert len(inner.all_special_ids) >= 2


def test_a_special_token_at_the_end_keeps_its_letters(tokenizer) -> None:
    plain = plain_captions(tokenizer)
    for word in specials(tokenizer):
        assert len(content(plain, f"red {word}")[0]) > len(content(plain, "red")[0])


def test_all_other_texts_give_the_tokens_that_they_gave(tokenizer) -> None:
    assert torch.equal(plain_captions(tokenizer)(PLAIN), tokenizer(PLAIN))


def test_wide_letters_that_cleaning_makes_narrow_do_not_become_a_special_token(tokenizer) -> None:
    plain = plain_captions(tokenizer)
    blue = content(tokenizer, "blue")[0]
    for word in specials(tokenizer):
        wide = "".join(chr(ord(letter) + 0xFEE0) if 0x21 <= ord(letter) <= 0x7E else letter for letter in word)
        assert content(plain, f"red {wide} blue")[0][-len(blue) :] == blue


@pytest.mark.parametrize("text", ["x" * 10**6, "word " * 200_000, "&amp;amp;" * 100_000, " " * 900_000 + "red", "qzxjkvbpyg" * 100_000])
def test_a_caption_of_a_megabyte_is_tokenised_in_seconds(text: str) -> None:
    plain = plain_captions(open_clip.SimpleTokenizer())
    plain(["a"])
    start = time.process_time()
    tokens = plain([text])
    assert time.process_time() - start < 10
    assert tokens.shape == (1, 77)
    assert (content(plain, text)[0] == content(plain, "red")[0]) == text.endswith("red")


def test_a_cut_text_has_the_tokens_of_the_whole_one() -> None:
    whole = open_clip.SimpleTokenizer()
    for text in ("a photo of something, " * 2000, "&amp; " * 9000, "日本語 " * 4000, "1 " * 40_000):
        assert torch.equal(plain_captions(whole)([text]), whole([text]))


def test_a_wrapped_tokenizer_is_the_same_in_a_worker_and_wraps_once() -> None:
    plain = plain_captions(open_clip.SimpleTokenizer())
    assert isinstance(plain, PlainCaptions)
    assert plain_captions(plain) is plain
    assert plain.context_length == 77
    again = pickle.loads(pickle.dumps(plain))  # noqa: S301  # our own bytes
    assert torch.equal(again(["red <end_of_text> blue"]), plain(["red <end_of_text> blue"]))
    assert isinstance(TowerView(PreprocessCfg(size=8), open_clip.SimpleTokenizer()).tokenize, PlainCaptions)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_caption"),
        (b" \n\t", "empty_caption"),
        ("\u200b\u2060\ufeff".encode(), "empty_caption"),
        (b"\0\0\0\0", "bad_text"),
        (b"red\0blue", "bad_text"),
        ("red".encode("utf-16"), "bad_text"),
        ("red".encode("utf-16-le"), "bad_text"),
        (b"\xed\xa0\x80", "bad_text"),  # a surrogate
        ("é".encode("latin-1"), "bad_text"),
        (b"a" * ((1 << 20) + 1), "bad_text"),
    ],
)
def test_what_is_no_caption_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        caption(data)
    assert caught.value.reason == reason


def test_a_byte_order_mark_is_no_part_of_the_caption() -> None:
    assert caption("\ufeffred".encode()) == "red"
