"""Small tokenizers of the kinds that language models have: byte pairs as GPT-2's and Qwen2's, pieces as Llama's, whole words."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

_MERGES = [("y", "e"), ("ye", "s"), ("Ġ", "yes"), ("r", "e"), ("re", "d"), ("Ġ", "red"), ("Ġ", "N"), ("ĠN", "o"), (":", "Ċ"), ("Ċ", "Ċ")]
_WORDS = ("yes", "no", "red", "blue", "USER", "ASSISTANT", ":", "?", "is", "it", "<", ">", "end", "|", "/", "s")


def byte_pairs(special: tuple[str, ...], merges: list[tuple[str, str]] = _MERGES) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    model = Tokenizer(models.BPE(vocabulary, merges))
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(token, special=True) for token in special])
    return model


def gpt2() -> PreTrainedTokenizerFast:
    """One special token for everything, no begin token of its own."""
    model = byte_pairs(("<|endoftext|>",))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    only = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token=only, eos_token=only, unk_token=only)


def qwen2() -> PreTrainedTokenizerFast:
    """Turns between <|im_start|> and <|im_end|>; a line break joins the punctuation before it."""
    model = byte_pairs(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    more = {"extra_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>", **more)


def llama() -> PreTrainedTokenizerFast:
    """Pieces with a mark for the space before a word, single bytes for what it has no piece for, and a begin token put first."""
    special = ("<unk>", "<s>", "</s>")
    pieces = ["▁", *(chr(letter) for letter in range(33, 127))]
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s"), ("▁", "r"), ("▁r", "e"), ("▁re", "d"), ("<", "/"), ("</", "s")]
    every = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *(a + b for a, b in merges)]
    vocabulary = {token: number for number, token in enumerate(every)}
    model = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def whole_words() -> PreTrainedTokenizerFast:
    """Words between spaces, with its special tokens among them: it has no other way to write those."""
    special = ("<unk>", "<start>", "<end>")
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate((*special, *_WORDS))}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<start>", eos_token="<end>", unk_token="<unk>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {"gpt2": gpt2, "qwen2": qwen2, "llama": llama, "whole_words": whole_words}
