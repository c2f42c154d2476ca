"""Plain JSON and texts that come from people, as pages can hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def json_object(path: Path) -> dict[str, Any] | str:
    """The file's object, or why there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path}: is not there"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path}: cannot be read ({error})"
    return content if isinstance(content, dict) else f"{path}: holds no object"


def clean(text: str) -> str:
    """Text that every output file can hold: without lone surrogates and control characters, which neither UTF-8 nor XML has."""
    return "".join(one if one.isprintable() or one == "\n" else " " if one.isspace() else "\N{REPLACEMENT CHARACTER}" for one in text)


def cleaned(value: Any) -> Any:
    """`clean` for every text in plain JSON."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(str(key)): cleaned(inner) for key, inner in value.items()}
    return [cleaned(inner) for inner in value] if isinstance(value, list) else value
