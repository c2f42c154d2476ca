"""The keys of a recipe, read from its sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from megakd.recipe import Section


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that a value can be given to, a table of names among them, with its field; sections in such tables as `key.NAME.`."""
    for name, field in section.model_fields.items():
        inner = [part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, Section)]
        table = is_table(field)
        if table or not inner:
            yield prefix + name, field
        for part in inner:
            yield from leaves(part, f"{prefix}{name}.{'NAME.' if table else ''}")


def is_table(field: FieldInfo) -> bool:
    """Whether its keys are names that the recipe gives."""
    return any(get_origin(part) is dict for part in _parts(field.annotation))


def is_text_or_table(field: FieldInfo) -> bool:
    """Whether it may also be a text, in the place of the whole table."""
    return is_table(field) and get_origin(field.annotation) is not dict and str in get_args(field.annotation)


def takes_text(field: FieldInfo) -> bool:
    """Whether it is a table whose values may be texts, beside sections."""
    tables = [part for part in _parts(field.annotation) if get_origin(part) is dict]
    return any(part is str for table in tables for part in _parts(get_args(table)[1]))


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)
