"""Small TOML and JSON files that people write, and values for messages.

What a parser takes and no setting can mean is refused by key: a key that is there twice, NaN and infinity, integers beyond 64 bits, dates,
control characters, endless nesting.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megakd.recipe import strict_json

MOST_BYTES = 16_000_000
DEEPEST = 40
# Tab and line breaks are text; a lone surrogate is a byte that was no UTF-8.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
LARGEST = 2**63 - 1


def exists(path: Path) -> bool:
    """False also for a name that is too long for the file system or has a NUL in it."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_text(path: Path, named: str) -> str:
    """The file in UTF-8, without a byte order mark. Raises ValueError that begins with `named`, the file's name for people."""
    try:
        if path.is_dir():
            raise ValueError(f"{named}: this is a folder; name the file in it")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{named}: cannot be read ({error.strerror or error}); check the path and its permissions") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{named}: larger than {MOST_BYTES // 10**6} MB, so it is something else; check the path")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{named}: byte {content[error.start]:#04x} in line {line} is not UTF-8; save the file as UTF-8") from None


def read_json(path: Path, named: str) -> Any:
    """The value in a file. Raises ValueError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, named), named)


def parse_json(text: str, named: str) -> Any:
    """The value in `text`. Raises ValueError that begins with `named` for what is no JSON, and for what no setting can mean."""
    try:
        value = json.loads(text, object_pairs_hook=strict_json.keys_once)
    except strict_json.KeyTwice as error:
        raise ValueError(f"{named}: not valid JSON: the key {shown(error.key)} is there twice; keep one") from None
    except json.JSONDecodeError as error:
        hint = "; JSON has no comments" if re.search(r"^\s*(//|#|/\*)", text, re.MULTILINE) else ""
        raise ValueError(f"{named}: not valid JSON: {error}{hint}") from None
    except RecursionError:
        raise ValueError(f"{named}: nested deeper than {DEEPEST} levels") from None
    except ValueError as error:
        raise ValueError(f"{named}: not valid JSON: {_brief(error)}") from None
    check_values(value, named)
    return value


def parse_toml(text: str, named: str) -> dict[str, Any]:
    """The table in `text`; raises as `parse_json` does."""
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{named}: nested deeper than {DEEPEST} levels") from None
    except ValueError as error:
        raise ValueError(f"{named}: not valid TOML: {_brief(error)}") from None
    check_values(value, named)
    return value


def shown(value: Any, most: int = 200) -> str:
    """A value for a message, on one line and cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # Python refuses to print integers of more than 4300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def nearest(word: object, known: Iterable[str], most: int = 1, cutoff: float = 0.5) -> list[str]:
    """The known names most like `word`, which a user wrote; of none above 100 characters, as comparing takes the square of the length.

    cutoff: least likeness, 0 to 1.
    """
    text = str(word)
    return difflib.get_close_matches(text, list(known), n=most, cutoff=cutoff) if len(text) <= 100 else []


def did_you_mean(word: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A question for an error message, with a space behind it: "did you mean 'optim.lr'? "; empty where no known name is near."""
    near = nearest(word, known, cutoff=cutoff)
    return f"did you mean {near[0]!r}? " if near else ""


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one with dotted keys; an empty table inside is a value of its own."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return leaves


def check_values(value: Any, named: str) -> None:
    """Raise ValueError for what no setting can mean."""
    if problem := next(impossible(value), None):
        raise ValueError(f"{named}: {problem}")


def impossible(value: Any) -> Iterator[str]:
    """A line, KEY = VALUE: reason, for each value inside that no setting can mean."""
    for key, inner, depth in _walk(value):
        where = shown(key)[1:-1] if key else "(all)"
        if depth > DEEPEST:
            yield f"{where}: nested deeper than {DEEPEST} levels"
            return
        if isinstance(inner, dict):
            for name in map(str, inner):
                if not name.strip():
                    yield f"{where}: the key {name!r} in it is empty; give it a name"
                elif UNPRINTABLE.search(name):
                    yield f"{where}: the key {shown(name)} in it holds a control character; take it out"
        elif isinstance(inner, str) and (match := UNPRINTABLE.search(inner)):
            yield f"{where} = {shown(inner)}: holds the control character {match[0]!r}; take it out"
        elif isinstance(inner, float) and not math.isfinite(inner):
            yield f"{where} = {inner}: not a finite number; write one"
        elif isinstance(inner, int) and abs(inner) > LARGEST:
            yield f"{where} = {shown(inner, 40)}: too large; integers have 64 bits"
        elif inner is not None and not isinstance(inner, (str, bool, int, float, list)):
            yield f'{where} = {inner}: a {type(inner).__name__}, which no setting is; as a name it stands in quotes: "{inner}"'


def _walk(value: Any) -> Iterator[tuple[str, Any, int]]:
    """(dotted key, value, depth) of everything inside, without recursion, as it may be too deep."""
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    while waiting:
        key, inner, depth = waiting.pop()
        yield key, inner, depth
        if depth > DEEPEST:
            continue
        if isinstance(inner, dict):
            waiting += [(f"{key}.{name}" if key else str(name), below, depth + 1) for name, below in inner.items()]
        elif isinstance(inner, list):
            waiting += [(f"{key}[{number}]", below, depth + 1) for number, below in enumerate(inner)]


def _brief(error: ValueError) -> str:
    text = str(error)
    return "an integer of thousands of digits" if "integer string conversion" in text else text[:300]
