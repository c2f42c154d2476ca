"""Reads and writes a language model's tokenizer, and compares two on texts.

transformers' AutoTokenizer takes the class of some model types (qwen2, phi3, jamba, ...) from its own table, whatever the folder says, and
such a class makes its own normaliser and pre-tokeniser: another tokenizer is then read back than was written, without an error.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

log = logging.getLogger("megakd.models")
CONFIG_FILE = "tokenizer_config.json"
# Classes that are nothing but tokenizer.json, under the names that transformers 4 and 5 write.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")
# What tokenizers differ in: case, accents, digits, white space, punctuation, other scripts, a begin token of their own.
SAMPLES = (
    "",
    "USER: What colour is the star? ASSISTANT: Red",
    "yes",
    " no ",
    "It's 12 o'clock,\n\n  and\tthe cafe\u0301 (na\u00efve) is closed!",
    "\u65e5\u672c\u8a9e \u4e2d\u6587 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f600",
    "x" * 40,
)


def read(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, as its tokenizer.json defines it where there is one: the model was trained with that.

    Where transformers' class gives other ids than the file, the file is used, with a warning. Raises what transformers raises.
    """
    has_file = not Path(name).is_dir() or (Path(name) / "tokenizer.json").is_file()
    if has_file and get_tokenizer_config(name).get("tokenizer_class") in _PLAIN:
        return _of_file(name)
    by_class: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not has_file:
        return by_class
    try:
        by_file = _of_file(name)
    except Exception:  # of a hub name that has no such file, or one that says less than its class knows
        return by_class
    for text in SAMPLES:
        ids = [one(text, add_special_tokens=False, verbose=False).input_ids for one in (by_file, by_class)]
        if ids[0] != ids[1]:
            kind = type(by_class).__name__
            log.warning("%s: transformers' %s makes other ids of texts than its tokenizer.json, which is taken", name, kind)
            return by_file
    return by_class


def _of_file(name: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
    return tokenizer


def write(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write it to `folder`, which may hold the model's config.json already, so that `read` and AutoTokenizer give the same tokenizer.

    Raises ValueError when another one is read back all the same.
    """
    tokenizer.save_pretrained(folder)
    if differences(tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), SAMPLES):
        # For the model types of its table AutoTokenizer heeds `tokenizer_class` only beside an `auto_map`. The name in that does not
        # exist, and is looked up only with trust_remote_code.
        path = folder / CONFIG_FILE
        content = json.loads(path.read_text(encoding="utf-8"))
        if (kind := content.get("tokenizer_class")) in _PLAIN:
            auto_map = {"AutoTokenizer": [None, f"tokenizer_class.{kind}"]}
            path.write_text(json.dumps({**content, "auto_map": auto_map}, indent=2), encoding="utf-8")
    for reader in (read, AutoTokenizer.from_pretrained):
        if different := differences(tokenizer, reader(str(folder)), SAMPLES):
            raise ValueError(
                f"{folder}: transformers reads back another tokenizer than was written ({different[0]}): take decoder.tokenizer and the "
                f"model type from one family, or a tokenizer that is saved as a tokenizer.json alone"
            )


def check_export(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raises ValueError for a tokenizer that could not be read back beside a model of this configuration: before a run, not after it."""
    with tempfile.TemporaryDirectory(prefix="megakd-tokenizer-") as folder:
        config.save_pretrained(folder)
        try:
            write(tokenizer, Path(folder))
        except ValueError as error:
            raise ValueError(f"decoder.tokenizer: {str(error).removeprefix(folder).lstrip(': ')}") from error


def differences(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[str]:
    """In what two tokenizers differ, a phrase each; empty where they are the same on `texts`, in their special tokens and chat template."""
    both = (one, other)
    facts = {name: [getattr(each, name) for each in both] for name in ("bos_token_id", "eos_token_id")}
    facts |= {"words": [len(each) for each in both], "special tokens": [sorted(set(each.all_special_ids)) for each in both]}
    facts |= {"chat template": [each.chat_template for each in both]}
    phrases = [f"{name} {first}, then {second}" for name, (first, second) in facts.items() if first != second]
    for text in texts:
        first, second = (each(text, verbose=False).input_ids for each in both)
        if first != second:
            phrases.append(f"{text[:40]!r} is {first[:8]}, then {second[:8]}")
        elif one.decode(first, skip_special_tokens=True) != other.decode(first, skip_special_tokens=True):
            phrases.append(f"{text[:40]!r} is decoded differently")
    return phrases
