"""Question files read strictly: whole JSON files, their entries and fields. Errors are ValueErrors that name file and entry."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megakd.recipe import strict_json

Entry = Mapping[str, Any]
_SHOWN = 3  # examples in an error
_LONGEST = 80  # characters of one of them
_MOST_BYTES = 8 * 10**9  # of a file, which is read whole; GQA's largest has 2.5


class Misfit(ValueError):
    """The file is not of the expected form. value: of its JSON, None where it is none."""

    def __init__(self, path: Path, problem: str, value: Any) -> None:
        super().__init__(f"{path} {problem}")
        self.value = value


def _read(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise ValueError(f"{path} is no file of questions: {'no file' if not stat.S_ISREG(status.st_mode) else status.st_size} bytes")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: byte {error.start} is not UTF-8 ({error.reason}); save it in UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _json(path: Path) -> Any:
    text = _read(path)
    try:
        return strict_json.loads(text)
    except strict_json.NotStrict as error:
        first = next((line for line in text.split("\n") if line.strip()), "")
        raise Misfit(path, str(error), _value_or_none(first)) from error


def _value_or_none(text: str) -> Any:
    with contextlib.suppress(strict_json.NotStrict):
        return strict_json.loads(text)
    return None


def read_lines(path: Path, key: str, expected: str) -> Iterator[tuple[int, Entry]]:
    """(number from 1, object) of each line that is not blank. Each object has `key`; expected: what a line is, for errors."""
    text = _read(path)
    # not splitlines: a form feed or U+2028 may stand inside a text
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = strict_json.loads(line)
        except strict_json.NotStrict as error:
            if line.lstrip().startswith("{") and f'"{key}"' in line:
                raise ValueError(f"{path}: line {number} {error}") from error
            entry = None
        if not isinstance(entry, dict) or key not in entry:
            raise Misfit(path, f"line {number} is no {expected}", _value_or_none(text) if number == 1 else None)
        yield number, entry


def read_any(path: Path) -> Any:
    """The value in a file of any layout. Raises ValueError for a file that cannot be read or is no JSON."""
    return _json(path)


def read_object(path: Path, key: str) -> dict[str, Any]:
    """A file that is an object with a list under `key`."""
    value = _json(path)
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        raise Misfit(path, f'has no list "{key}"', value)
    return value


def released(entries: list[Entry]) -> Iterator[Entry]:
    """The entries in order; each is let go of, so that a million of them need not lie beside what is made of them."""
    for place, entry in enumerate(entries):
        entries[place] = {}
        yield entry


def read_mapping(path: Path, key: str) -> dict[str, Entry]:
    """A file that is an object of entries by id, each with `key`."""
    value = _json(path)
    if not isinstance(value, dict) or not value:
        raise Misfit(path, "is no object of questions by their id", value)
    for name, entry in value.items():
        if not isinstance(entry, dict) or key not in entry:
            raise Misfit(path, f'has under "{name[:_LONGEST]}" no object with "{key}"', value)
    return value


def read_list(path: Path, *keys: str) -> list[Entry]:
    """A file that is a list of entries, each with `keys`."""
    value = _json(path)
    if not isinstance(value, list):
        raise Misfit(path, "is no list", value)
    for number, entry in enumerate(value):
        if not isinstance(entry, dict) or not set(keys) <= set(entry):
            raise Misfit(path, f"has as entry {number} no object with {' and '.join(repr(key) for key in keys)}", value)
    return value


def by_id(entries: Iterable[Any], path: Path) -> dict[Any, Entry]:
    """Entries by their question_id. Raises ValueError where one is missing or there twice."""
    by_question: dict[Any, Entry] = {}
    for number, entry in enumerate(entries):
        question_id = object_of(entry, f"{path}: entry {number}").get("question_id")
        if not is_id(question_id):
            raise ValueError(f"{path}: entry {number} has question_id = {shown(question_id)}: a number or a text")
        if question_id in by_question:
            raise ValueError(f"{path}: question_id {shown(question_id)} is there twice: was the file made of overlapping parts?")
        by_question[question_id] = entry
    return by_question


def same_ids(questions: Mapping[Any, Entry], annotations: Mapping[Any, Entry], path: Path, annotations_path: Path) -> None:
    """Raises ValueError where questions and annotations are not of the same ids."""
    unanswered, unknown = [key for key in questions if key not in annotations], [key for key in annotations if key not in questions]
    if unanswered or unknown:
        raise ValueError(
            f"{annotations_path} does not match {path}: {len(unanswered)} of {len(questions)} questions have no annotation "
            f"({some(unanswered)}), {len(unknown)} of {len(annotations)} annotations have no question ({some(unknown)}); "
            f"take both files from one split and release"
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


def human_answers(entry: Entry, where: str) -> tuple[str, ...]:
    """The texts of {"answers": [{"answer": ...}]}; () where the field is missing or null."""
    answers = [] if entry.get("answers") is None else items(entry, "answers", where)
    return tuple(text_of(object_of(answer, f"{where}, an answer"), "answer", where) for answer in answers)


def object_or_empty(entry: Entry, key: str, where: str) -> Entry:
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


def question_text(entry: Entry, key: str, where: str) -> str:
    """The text under `key`, which may not be blank."""
    text = text_of(entry, key, where)
    if not text.strip():
        raise ValueError(f'{where} asks nothing: "{key}" = {text!r}; take it out')
    return text
