"""A model's tokenizer as one tokenizer.json, with its padding and truncation, for programs without megakd, open_clip and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from megakd.export.transformers_tokens import of_transformers
from megakd.export.trial_inputs import texts
from megakd.models.clip import ModelSpec

FILE = "tokenizer.json"


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
    """With the model's length, to which it pads and cuts. Raises NotMapped, a ValueError, for one that is not transformers' alone."""
    tokenize: Any = description.tokenize
    length = description.context_length
    made = Tokenizer.from_str(of_transformers(tokenize, length, masked=False).backend_tokenizer.to_str())
    pad = int(tokenize.tokenizer.pad_token_id) if hasattr(tokenize, "tokenizer") else 0  # open_clip's own pads with 0
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=pad, pad_token=made.id_to_token(pad))
    return made
