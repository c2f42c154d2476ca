"""A model's tokenizer as one tokenizer.json, with its padding and truncation, for programs without megakd, open_clip and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from megakd.export.trial_inputs import texts
from megakd.models.clip import ModelSpec

FILE = "tokenizer.json"
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"  # transformers' names of CLIP's "<start_of_text>" and "<end_of_text>"


def cleaning(description: ModelSpec) -> str:
    """open_clip's name of what is done to a text before: "lower", "whitespace" or "canonicalize"; "none"."""
    clean = getattr(description.tokenize, "clean_fn", None)
    return getattr(clean, "__name__", "none").removeprefix("_clean_")


def write(description: ModelSpec, folder: Path) -> str:
    """Write `folder/tokenizer.json`, where it gives the tokens of the model's own tokenizer. Gives a line that says so, or that it is not
    written because they would be others."""
    try:
        made = _fast(description)
    except (AttributeError, TypeError, ValueError) as error:
        return f"no {FILE}: this tokenizer has no fast form ({error}); texts are tokenised by open_clip"
    samples, clean = texts(), getattr(description.tokenize, "clean_fn", str)
    expected = description.tokenize(samples)
    rows = [made.encode(clean(sample)).ids for sample in samples]
    if {len(row) for row in rows} != {expected.shape[1]} or not torch.equal(torch.tensor(rows), expected):
        return f"no {FILE}: alone it gives other tokens than the model was trained with; texts are tokenised by open_clip"
    made.save(str(folder / FILE))
    return f"{FILE}: gives the model's own tokens of {len(samples)} texts"


def _fast(description: ModelSpec) -> Tokenizer:
    """Of a transformers tokenizer its own; CLIP's made of open_clip's words and merges. It pads and cuts to the model's length."""
    tokenize: Any = description.tokenize
    length = description.context_length
    inner = getattr(tokenize, "tokenizer", None)
    if inner is None:
        renamed = {tokenize.sot_token_id: _BEGIN, tokenize.eot_token_id: _END}
        vocabulary = {renamed.get(number, word): number for word, number in tokenize.encoder.items()}
        merges = [pair for pair in sorted(tokenize.bpe_ranks, key=tokenize.bpe_ranks.__getitem__) if len(pair) == 2]
        made = Tokenizer.from_str(CLIPTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer.to_str())
        pad = 0
    else:
        made = Tokenizer.from_str(inner.backend_tokenizer.to_str())
        pad = inner.pad_token_id
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=pad, pad_token=made.id_to_token(pad))
    return made
