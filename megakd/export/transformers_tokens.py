"""A model's tokenizer for transformers, and what its texts become there.

open_clip cleans a text before any tokenizer sees it (ftfy, white space, case or punctuation). A tokenizer of transformers does not: it
gives the same tokens for texts that are clean, which is checked, and texts that cleaning changes are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from open_clip import SimpleTokenizer
from torch import Tensor
from transformers import CLIPTokenizer

from megakd.export.transformers_layers import NotMapped
from megakd.models.tokenizing import Tokenize

BEGIN, END = "<|startoftext|>", "<|endoftext|>"  # transformers' names of CLIP's "<start_of_text>" and "<end_of_text>"


def of_transformers(tokenize: Tokenize, context: int, *, masked: bool) -> Any:
    """The tokenizer to be saved. masked: whether the text tower may be told which tokens are padding.

    Raises NotMapped for one that open_clip runs in a way that no tokenizer of transformers does alone.
    """
    if isinstance(tokenize, SimpleTokenizer):
        if tokenize.reduction_fn is not None:
            raise NotMapped("its tokenizer leaves words out (reduction_mask), which transformers' cannot")
        renamed = {tokenize.sot_token_id: BEGIN, tokenize.eot_token_id: END}
        vocabulary = {renamed.get(number, word): number for word, number in tokenize.encoder.items()}
        merges = [pair for pair in sorted(tokenize.bpe_ranks, key=tokenize.bpe_ranks.__getitem__) if pair]
        inner: Any = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context)
    elif hasattr(tokenize, "tokenizer"):
        if getattr(tokenize, "tokenizer_mode", "") or getattr(tokenize, "strip_sep_token", False):
            raise NotMapped("its tokenizer's tokens are changed by open_clip (tokenizer_mode, strip_sep_token)")
        inner = copy.deepcopy(tokenize.tokenizer)
    else:
        raise NotMapped(f"its tokenizer is open_clip's {type(tokenize).__name__}")
    inner.model_max_length, inner.model_input_names = context, ["input_ids", "attention_mask"] if masked else ["input_ids"]
    # what is saved
    inner.init_kwargs.update(model_max_length=inner.model_max_length, model_input_names=inner.model_input_names)
    return inner


def cleaned(tokenize: Any, texts: Sequence[str]) -> list[str]:
    """Texts as the model's tokenizer gets them from open_clip."""
    return [tokenize.clean_fn(text) for text in texts]


def end_token(tokens: Tensor, pool: str, eos: int) -> int:
    """The token at whose output open_clip reads each of the rows, -1 where that is not one token. tokens: (n, length)."""
    at = (tokens == eos).int().argmax(1) if pool == "eos" else tokens.argmax(1)
    found = set(tokens[torch.arange(len(tokens)), at].tolist())
    return int(found.pop()) if len(found) == 1 else -1


def until_end(row: Tensor, end: int) -> list[int]:
    """A text's tokens without padding: up to the first end token, all where there is none."""
    values = row.tolist()
    return values[: values.index(end) + 1] if end in values else values
