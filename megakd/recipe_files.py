"""Recipes on disk: find one by name or path, apply `--set` overrides, explain every error, compare two.

Errors are `ValueError`s that name the key, the value, the file and the remedy, with the nearest known key for a typo.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megakd.recipe import Recipe

# Keys that say how a run is watched and stored, not what it learns: a run may be resumed with other values of these.
FREE_ON_RESUME = (
    *("checkpoint.", "log.", "watchdog.", "evaluation.", "kernels.", "teacher.offload", "teacher.ds_config", "decoder.recipe"),
    *("data.workers", "data.cache", "data.max_bad_fraction"),
)


def shipped() -> list[str]:
    """Names of the recipes inside the package, sorted."""
    return sorted(entry.name.removesuffix(".toml") for entry in resources.files("megakd.recipes").iterdir() if entry.name.endswith(".toml"))


def load(source: str, overrides: Iterable[str] = ()) -> tuple[Recipe, str]:
    """The recipe called `source` (a shipped name, a `.toml` file, or a run's `run.json`) with `key=value` overrides applied.

    Returns the recipe and the path it was read from, for messages. Raises ValueError as the module's docstring says.
    """
    settings, origin = _read(source)
    applied = list(overrides)
    for override in applied:
        _apply(settings, override)
    origin_in_messages = f"{origin} with {' '.join(f'--set {o}' for o in applied)}" if applied else origin
    try:
        return Recipe.model_validate(settings), origin
    except ValidationError as error:
        raise ValueError(f"recipe {origin_in_messages}:\n" + "\n".join(_explain(problem) for problem in error.errors())) from None


def _read(source: str) -> tuple[dict[str, Any], str]:
    path = Path(source)
    if path.suffix == ".toml" or path.suffix == ".json" or "/" in source:
        if not path.is_file():
            raise ValueError(
                f"recipe {source}: no such file; give a path to a .toml file, or one of the shipped names: {', '.join(shipped())}"
            )
        return _parse(path.read_text(encoding="utf-8"), path), str(path)
    if source not in shipped():
        nearest = difflib.get_close_matches(source, shipped(), n=1, cutoff=0.4)
        suggestion = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"recipe {source!r}: not a shipped recipe; {suggestion}shipped: {', '.join(shipped())}; a path must end in .toml")
    text = (resources.files("megakd.recipes") / f"{source}.toml").read_text(encoding="utf-8")
    return _parse(text, Path(f"{source}.toml")), f"megakd/recipes/{source}.toml"


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"recipe {path}: not valid {path.suffix[1:].upper()}: {error}") from None
    if path.suffix == ".json":
        if "recipe" not in parsed:
            raise ValueError(f"recipe {path}: a .json recipe is the run.json of a run folder, and this file has no key 'recipe'")
        return dict(parsed["recipe"])
    return parsed


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {override}: write key=value, for example --set optim.lr=3e-4")
    *sections, last = key.strip().split(".")
    for name in sections:
        inner = settings.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override}: '{name}' is a value, not a section")
        settings = inner
    settings[last] = _value(text.strip())


def _value(text: str) -> Any:
    """A TOML value (3e-4, true, [1, 2], "text"); what is none is taken as a bare string, so that paths need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "(recipe)"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        suggestion = f"did you mean {'.'.join([*location[:-1], nearest[0]])!r}? " if nearest else ""
        return f"  {key}: unknown key; {suggestion}known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"  {key}: missing; every recipe has to give it"
    reason = problem["msg"].removeprefix("Value error, ")
    value = "" if isinstance(problem["input"], dict) else f" = {problem['input']!r}"
    return f"  {key}{value}: {reason}"


def _known_keys(section: list[str]) -> list[str]:
    model: Any = Recipe
    for name in section:
        field = model.model_fields.get(name) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = next((option for option in _options(field.annotation) if isinstance(option, type) and issubclass(option, BaseModel)), None)
    return list(model.model_fields) if model is not None else []


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Lines 'key: old -> new' for each setting that changes what is learned; empty when a run of `old` may go on as `new`."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = sorted(key for key in before.keys() | after.keys() if not key.startswith(FREE_ON_RESUME))
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
