"""A language model's tokenizer as files: read as they say, written so that they are read as the same one, and compared on texts.

transformers' AutoTokenizer takes the class of some model types (qwen2, phi3, jamba, ...) from its own table, whatever the folder says, and
such a class derives normaliser and pre-tokeniser anew: a tokenizer of one's own is then read back as another one, without a word.
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
    """The tokenizer of a folder or hub name, exactly as its tokenizer.json has it where there is one: the model was trained with that.

    Where the class that transformers takes makes other ids of texts than the file, the file's are taken, and that is said. Raises what
    transformers raises.
    """
    if get_tokenizer_config(name).get("tokenizer_class") in _PLAIN and _has_tokenizer_json(name):
        return _of_file(name)
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not _has_tokenizer_json(name):
        return found
    try:
        filed = _of_file(name)
    except Exception:  # of a hub name that has no such file, or one that says less than its class knows
        return found
    for text in SAMPLES:
        ids = [one(text, add_special_tokens=False, verbose=False).input_ids for one in (filed, found)]
        if ids[0] != ids[1]:
            log.warning("%s: transformers' %s makes other ids of texts than its tokenizer.json, which is taken", name, type(found).__name__)
            return filed
    return found


def _of_file(name: str) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
    return found


def _has_tokenizer_json(name: str) -> bool:
    folder = Path(name)
    return not folder.is_dir() or (folder / "tokenizer.json").is_file()


def write(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write it to `folder`, which may hold the model's config.json already, so that `read` and AutoTokenizer give the same tokenizer.

    Raises ValueError when it is read back as another one all the same.
    """
    tokenizer.save_pretrained(folder)
    if differences(tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), SAMPLES):
        _insist(folder)
    for reader in (read, AutoTokenizer.from_pretrained):
        if found := differences(tokenizer, reader(str(folder)), SAMPLES):
            raise ValueError(
                f"{folder}: transformers reads back another tokenizer than was written ({found[0]}): take decoder.tokenizer and the model "
                f"type from one family, or a tokenizer that is saved as a tokenizer.json alone"
            )


def _insist(folder: Path) -> None:
    """Make AutoTokenizer believe `tokenizer_class`.

    It does so for the model types of its table only where an `auto_map` is there as well. The name in it leads nowhere, and is not looked
    for as long as nobody allows remote code.
    """
    path = folder / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") in _PLAIN:
        name = f"tokenizer_class.{content['tokenizer_class']}"
        path.write_text(json.dumps({**content, "auto_map": {"AutoTokenizer": [None, name]}}, indent=2), encoding="utf-8")


def check_export(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raises ValueError for a tokenizer that could not be read back beside a model of this configuration: before a run, not after it."""
    with tempfile.TemporaryDirectory(prefix="megakd-tokenizer-") as folder:
        config.save_pretrained(folder)
        try:
            write(tokenizer, Path(folder))
        except ValueError as error:
            raise ValueError(f"decoder.tokenizer: {str(error).removeprefix(folder).lstrip(': ')}") from error


def differences(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[str]:
    """In what two tokenizers differ, for people; empty where they are the same on `texts` and in their special tokens."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in ("bos_token_id", "eos_token_id")}
    found = [f"{name} {first}, then {second}" for name, (first, second) in pairs.items() if first != second]
    if len(one) != len(other):
        found.append(f"{len(one)} words, then {len(other)}")
    if set(one.all_special_ids) != set(other.all_special_ids):
        found.append(f"special tokens {sorted(one.all_special_ids)}, then {sorted(other.all_special_ids)}")
    for text in texts:
        ids = [_ids(tokenizer, text) for tokenizer in (one, other)]
        if ids[0] != ids[1]:
            found.append(f"{text[:40]!r} is {ids[0][:8]}, then {ids[1][:8]}")
        elif one.decode(ids[0], skip_special_tokens=True) != other.decode(ids[0], skip_special_tokens=True):
            found.append(f"{text[:40]!r} is decoded differently")
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False).input_ids
    return ids
