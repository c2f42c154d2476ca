"""The JSON of questions' files, read strictly: whole files, their entries and fields. Errors are ValueErrors that name file and entry.

A file that is another format's than was said is named with the format that it looks like.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megakd.recipe import strict_json

Entry = Mapping[str, Any]
_SHOWN = 3  # examples in an error
_LONGEST = 80  # characters of one of them
_MOST_BYTES = 8 * 10**9  # of a file, which is read whole; GQA's largest has 2.5


def _read(path: Path) -> str:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            raise ValueError(f"{path} is no file of questions: {'no file' if not stat.S_ISREG(found.st_mode) else found.st_size} bytes")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: byte {error.start} is not UTF-8 ({error.reason}); save it in UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _json(path: Path, expected: str) -> Any:
    text = _read(path)
    try:
        return strict_json.loads(text)
    except strict_json.NotStrict as error:
        first = next((line for line in text.split("\n") if line.strip()), "")
        raise _other(path, expected, _loaded(first), str(error)) from error


def _loaded(line: str) -> Any:
    try:
        return strict_json.loads(line)
    except strict_json.NotStrict:
        return None


def read_lines(path: Path) -> Iterator[Entry]:
    """POPE's lines, an object each."""
    # not splitlines: a form feed or U+2028 may stand inside a text
    for number, line in enumerate(_read(path).split("\n")):
        if not line.strip():
            continue
        try:
            entry = strict_json.loads(line)
        except strict_json.NotStrict as error:
            if line.lstrip().startswith("{") and '"label"' in line:
                raise ValueError(f"{path}: line {number + 1} {error}") from error
            entry = None
        if not isinstance(entry, dict) or "label" not in entry:
            whole = _loaded(_read(path)) if number == 0 else None
            raise _other(path, "pope", whole, f'line {number + 1} is no JSON object with "text", "image" and "label"')
        yield entry


def read_object(path: Path, expected: str, key: str) -> dict[str, Any]:
    """A file that is an object with a list under `key`. expected: the format, for errors."""
    value = _json(path, expected)
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        raise _other(path, expected, value, f'has no list "{key}"')
    return value


def read_mapping(path: Path, expected: str, key: str) -> dict[str, Entry]:
    """A file that is an object of entries by id, each with `key`."""
    value = _json(path, expected)
    if not isinstance(value, dict) or not value:
        raise _other(path, expected, value, "is no object of questions by their id")
    for name, entry in value.items():
        if not isinstance(entry, dict) or key not in entry:
            raise _other(path, expected, value, f'has under "{name[:_LONGEST]}" no object with "{key}"')
    return value


def read_list(path: Path, expected: str, *keys: str) -> list[Entry]:
    """A file that is a list of entries, each with `keys`."""
    value = _json(path, expected)
    if not isinstance(value, list):
        raise _other(path, expected, value, "is no list")
    for number, entry in enumerate(value):
        if not isinstance(entry, dict) or not set(keys) <= set(entry):
            raise _other(path, expected, value, f"has as entry {number} no object with {' and '.join(repr(key) for key in keys)}")
    return value


def _other(path: Path, expected: str, value: Any, found: str) -> ValueError:
    """The error for a file that `expected` cannot be, with the format that it looks like."""
    likely = _looks_like(value)
    if likely is None or likely == expected:
        return ValueError(f"{path} {found}: format = {expected!r} does not fit it")
    if likely == "annotations":
        return ValueError(f"{path} {found}: it looks like VQAv2's annotations: name it under annotations, and the questions' file here")
    return ValueError(f"{path} {found}: it looks like {likely}: set format = {likely!r} instead of {expected!r}")


def _looks_like(value: Any) -> str | None:
    first = next(iter(value if isinstance(value, list) else value.values()), None) if isinstance(value, (list, dict)) and value else None
    inside = set(first) if isinstance(first, dict) else set()
    outside = set(value) if isinstance(value, dict) else set()
    signs = (
        ("vqav2", "questions" in outside),
        ("annotations", "annotations" in outside),
        ("textvqa", "data" in outside),
        ("pope", {"text", "label"} <= outside),
        ("gqa", isinstance(value, dict) and "imageId" in inside),
        ("scienceqa", isinstance(value, dict) and "choices" in inside),
        ("llava", isinstance(value, list) and "conversations" in inside),
        ("vizwiz", isinstance(value, list) and {"image", "question"} <= inside),
    )
    return next((name for name, fits in signs if fits), None)


def by_id(entries: Iterable[Any], path: Path) -> dict[Any, Entry]:
    """Entries by their question_id, which all have and no two share."""
    found: dict[Any, Entry] = {}
    for number, entry in enumerate(entries):
        question_id = object_of(entry, f"{path}: entry {number}").get("question_id")
        if not is_id(question_id):
            raise ValueError(f"{path}: entry {number} has question_id = {shown(question_id)}: a number or a text")
        if question_id in found:
            raise ValueError(f"{path}: question_id {shown(question_id)} is there twice: was the file made of overlapping parts?")
        found[question_id] = entry
    return found


def same_ids(asked: Mapping[Any, Entry], answered: Mapping[Any, Entry], path: Path, there: Path) -> None:
    """Raises ValueError where questions and annotations are not of the same ids."""
    unanswered, unasked = [key for key in asked if key not in answered], [key for key in answered if key not in asked]
    if unanswered or unasked:
        raise ValueError(
            f"{there} does not match {path}: {len(unanswered)} of {len(asked)} questions have no annotation ({some(unanswered)}), "
            f"{len(unasked)} of {len(answered)} annotations have no question ({some(unasked)}); take both files from one split and release"
        )


def some(values: Sequence[Any]) -> str:
    """The first of them, for an error."""
    return ", ".join(str(value)[:_LONGEST] for value in values[:_SHOWN]) + (", ..." if len(values) > _SHOWN else "") if values else "none"


def is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value for an error, cut where it is long."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} that is nested deeply"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def object_of(value: Any, where: str) -> Entry:
    """The value, which has to be an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}, not an object")
    return value


def items(entry: Entry, key: str, where: str) -> list[Any]:
    """The list under `key`, which has to be there."""
    value = entry.get(key)
    if not isinstance(value, list):
        raise ValueError(f'{where} has no list "{key}"')
    return value


def people(entry: Entry, where: str) -> tuple[str, ...]:
    """The texts of {"answers": [{"answer": ...}]}; none where the field is missing or null."""
    given = [] if entry.get("answers") is None else items(entry, "answers", where)
    return tuple(text_of(object_of(answer, f"{where}, an answer"), "answer", where) for answer in given)


def part(entry: Entry, key: str, where: str) -> Entry:
    """The object under `key`, empty where it is missing or null."""
    return {} if entry.get(key) is None else object_of(entry[key], f"{where}: {key}")


def strings(entry: Entry, key: str, where: str) -> list[str]:
    """The texts under `key`; none where it is missing or null."""
    values = [] if entry.get(key) is None else items(entry, key, where)
    if any(not isinstance(value, str) for value in values):
        raise ValueError(f'{where}: "{key}" holds something else than texts')
    return values


def text_of(entry: Entry, key: str, where: str) -> str:
    """The text under `key`, which has to be there."""
    value = entry.get(key)
    if not isinstance(value, str):
        raise ValueError(f'{where} has "{key}" = {shown(value)}: a text is expected')
    return value


def text_or(entry: Entry, key: str, where: str, default: str = "") -> str:
    """The text under `key`; the default where it is missing or null."""
    return default if entry.get(key) is None else text_of(entry, key, where)


def asked(entry: Entry, key: str, where: str) -> str:
    """The text under `key`, in which something has to be asked."""
    text = text_of(entry, key, where)
    if not text.strip():
        raise ValueError(f'{where} asks nothing: "{key}" = {text!r}; take it out')
    return text
