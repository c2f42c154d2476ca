"""JSON read strictly: what Python's reader takes beyond the standard, or fails on with other errors, is refused with a reason."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class NotStrict(ValueError):
    """Why a text is refused, to be put behind a file's name."""


class KeyTwice(ValueError):
    """An object has `key` twice."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for json.loads (`object_pairs_hook`). Raises KeyTwice."""
    content = dict(pairs)
    if len(content) < len(pairs):  # looked for only then: files of questions have millions of objects
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise KeyTwice(key)
            seen.add(key)
    return content


def loads(text: str, *, finite: bool = True) -> Any:
    """The value of a JSON text. finite: False takes NaN and infinity, as Python and pandas write them into a field of metadata.

    Raises NotStrict: no JSON; a key that an object has twice; NaN and infinity; thousands of digits; nesting that is too deep for Python;
    half a surrogate pair, which could not be written again.
    """
    try:
        constant, number = (_constant, _float) if finite else (float, float)
        value = json.loads(text, object_pairs_hook=keys_once, parse_constant=constant, parse_float=number)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except NotStrict:
        raise
    except KeyTwice as error:
        raise NotStrict(f"has the key {error.key[:80]!r} twice in one object") from error
    except json.JSONDecodeError as error:
        raise NotStrict(f"is no JSON ({error})") from error
    except UnicodeEncodeError as error:
        raise NotStrict("holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from error
    except RecursionError as error:
        raise NotStrict("is nested too deeply") from error
    except ValueError as error:  # int() of more than 4300 digits
        raise NotStrict(f"holds a number that cannot be read ({str(error)[:80]})") from error
    return value


def _constant(name: str) -> Any:
    raise NotStrict(f"holds {name}, which is no number of JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise NotStrict(f"holds {digits[:80]}, which is no finite number")
    return value
