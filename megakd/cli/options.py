"""What several verbs take, and options that a dataclass owns: one a field, with the field's default and help text."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

Recipe = Annotated[str, typer.Option(help="name of a shipped recipe or a .toml file")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override one setting of the recipe")]
Json = Annotated[Path | None, typer.Option(help="write the result to this file as well")]
Rounds = Annotated[int, typer.Option(min=1, help="how often the two alternate")]
Batch = Annotated[int, typer.Option(min=2, help="pairs a step")]
Steps = Annotated[int, typer.Option(min=1, help="timed steps a round")]
Workers = Annotated[int, typer.Option(min=1, help="decoding processes of each")]
Threads = Annotated[int, typer.Option(min=1, help="OpenMP threads of each")]


def from_fields(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with one option for each field of every parameter whose type is a dataclass; the verb itself gets the dataclass.

    A field's metadata are arguments of `typer.Option`; "flag" is its name where that is not the field's.
    """
    hints = get_type_hints(verb, include_extras=True)
    owners = {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if name in owners:
            types = get_type_hints(owners[name])
            parameters += [_option(field, types[field.name]) for field in dataclasses.fields(owners[name])]
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    def called(**values: Any) -> None:
        for name, owner in owners.items():
            own = {field.name: values.pop(field.name) for field in dataclasses.fields(owner)}
            lists = {key: tuple(value or ()) for key, value in own.items() if get_origin(get_type_hints(owner)[key]) is tuple}
            values[name] = owner(**own | lists)
        verb(**values)

    called.__name__, called.__doc__ = verb.__name__, verb.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _option(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    if get_origin(kind) is tuple:  # repeatable
        kind, default = GenericAlias(list, get_args(kind)[0]) | None, default or None
    settings = dict(field.metadata)
    option = typer.Option(settings.pop("flag", f"--{field.name}"), **settings)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
