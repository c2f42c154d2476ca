"""Recipes on disk: find one by name or path, apply `--set` overrides, explain every error, compare two.

Errors are `ValueError`s naming key, value, file and remedy, with the nearest known key for a typo.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megakd.recipe import Recipe, credentials, resume, texts
from megakd.recipe.models import IN_SHARDS
from megakd.recipe.schema import Scored
from megakd.recipe.section import Section, union_members

Of = TypeVar("Of", bound=Section)
MOST_PROBLEMS = 12  # in a message


def shipped() -> list[str]:
    """Names of the recipes inside the package, sorted."""
    return sorted(
        entry.name.removesuffix(".toml") for entry in resources.files("megakd.recipe.shipped").iterdir() if entry.name.endswith(".toml")
    )


def load(source: str, overrides: Iterable[str] = (), *, to_compare: bool = False) -> tuple[Recipe, str]:
    """The recipe `source` (a shipped name, a `.toml` file, or a run's `run.json`) with `key=value` overrides applied, and its path.

    Raises ValueError, also for values whose credentials were left out of a run.json unless the recipe is only `to_compare` with another.
    """
    settings, origin = _read(source)
    recipe = _validated(Recipe, settings, origin, list(overrides))
    if not to_compare:
        check_given(recipe, origin)
    return recipe, origin


def load_scored(source: str | None, overrides: Iterable[str] = ()) -> Scored:
    """What a model is scored on without a run: the sections of the recipe `source`, or of none, that say so, with overrides of them alone.

    Raises ValueError as `load`, and for an override of another section.
    """
    settings, origin = ({}, "of the command line") if source is None else _read(source)
    applied = list(overrides)
    for override in applied:
        section = override.partition("=")[0].strip().partition(".")[0]
        if section not in Scored.model_fields:
            raise ValueError(
                f"--set {override[:200]}: a model without a run is scored by {', '.join(Scored.model_fields)} alone; take it out"
            )
    scored = _validated(Scored, {key: value for key, value in settings.items() if key in Scored.model_fields}, origin, applied)
    check_given(scored, origin)
    return scored


def _validated(section: type[Of], settings: dict[str, Any], origin: str, applied: list[str]) -> Of:
    """The section of these settings, to which the overrides `applied` are applied. Raises ValueError for what is wrong, key by key."""
    for override in applied:
        _apply(settings, override, section)
    given = " ".join(f"--set {texts.shown(o)[1:-1] if len(o) > 400 else o}" for o in applied)
    origin_in_messages = f"{origin} with {given}" if applied else origin
    if problems := list(itertools.islice(texts.impossible(settings), MOST_PROBLEMS)):
        raise ValueError(f"recipe {origin_in_messages}:\n" + "\n".join(f"  {problem}" for problem in problems))
    try:
        return section.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"recipe {origin_in_messages}:\n{explain(error)}") from None


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe called `source`: a shipped name, a `.toml` file, or a run's `run.json`; see `megakd/recipe/schema.py` for its sections.

    overrides: settings that differ, each "key=value" with a value of TOML, as after `--set` on the command line.

    Raises ValueError with every key that is wrong, its value, the file, and the nearest known key for a typo.

    >>> recipe = megakd.load_recipe("smoke", ["optim.steps=100", "optim.lr=3e-4"])
    >>> recipe.optim.steps, recipe.objectives.similarity
    (100, 1.0)
    """
    return load(str(source), overrides)[0]


def check_given(section: BaseModel, origin: str, prefix: str = "") -> None:
    """Raise ValueError for values of a recipe, or of a section, whose credentials were left out of run.json."""
    for key, value in texts.flat(section.model_dump(mode="json"), prefix).items():
        if any(isinstance(text, str) and credentials.is_hidden(text) for text in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"recipe {origin}: {key} = {value!r}: run.json holds no credentials ({credentials.HIDDEN}); give the whole value "
                f"again, with --set {key}=..."
            )


def _read(source: str) -> tuple[dict[str, Any], str]:
    path = Path(source)
    if path.suffix in (".toml", ".json") or "/" in source:
        if not texts.exists(path):
            raise ValueError(
                f"recipe {source}: no such file; give a path to a .toml file, or one of the shipped names: {', '.join(shipped())}"
            )
        return _parse(texts.read_text(path, f"recipe {path}"), path), str(path)
    if source not in shipped():
        suggestion = texts.did_you_mean(source, shipped(), 0.4)
        shown = texts.shown(source)
        raise ValueError(f"recipe {shown}: not a shipped recipe; {suggestion}shipped: {', '.join(shipped())}; a path must end in .toml")
    text = (resources.files("megakd.recipe.shipped") / f"{source}.toml").read_text(encoding="utf-8")
    return _parse(text, Path(f"{source}.toml")), f"megakd/recipe/shipped/{source}.toml"


def _parse(text: str, path: Path) -> dict[str, Any]:
    named = f"recipe {path}"
    if path.suffix != ".json":
        return texts.parse_toml(text, named)
    parsed = texts.parse_json(text, named)
    settings = parsed.get("recipe") if isinstance(parsed, dict) else None
    if settings is None:
        raise ValueError(f"{named}: a .json recipe is the run.json of a run folder, and this file has no key 'recipe'")
    if not isinstance(settings, dict):
        raise ValueError(f"{named}: recipe = {texts.shown(settings)}: a table of settings is needed, as megakd writes it into run.json")
    return settings


def _apply(settings: dict[str, Any], override: str, root: type[BaseModel]) -> None:
    shown = override if len(override) <= 400 else texts.shown(override)[1:-1]
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {shown}: write key=value, for example --set optim.lr=3e-4")
    *sections, last = _parts(key.strip(), shown)
    for place, name in enumerate(sections, 1):
        inner = settings.setdefault(name, {})
        if not isinstance(inner, dict):
            if not _takes_a_table(sections[:place], root):
                raise ValueError(f"--set {shown}: '{name}' is a value, not a section")
            inner = settings[name] = {}  # shards, in whose place there are sources by name
        settings = inner
    settings[last] = _value(text.strip(), shown)


def _parts(key: str, override: str) -> list[str]:
    """Of a.b."c.d", the names a, b and c.d; names without quotes may be of any characters but dots."""
    parts = key.split(".")
    if '"' in key or "'" in key:
        try:
            inner: Any = tomllib.loads(f"{key} = 0")
        except (ValueError, RecursionError):
            raise ValueError(f'--set {override}: the key {texts.shown(key)} is not TOML\'s; quote a name that has dots: a."b.c"') from None
        parts = []
        while isinstance(inner, dict):
            ((name, inner),) = inner.items()
            parts.append(name)
    if not all(part.strip() for part in parts):
        raise ValueError(f"--set {override}: the key {texts.shown(key)} has an empty part; write key=value, for example optim.lr=3e-4")
    if len(parts) > texts.DEEPEST:
        raise ValueError(f"--set {override}: the key has {len(parts)} parts, more than any setting")
    return parts


def _value(text: str, override: str) -> Any:
    """A TOML value (3e-4, true, [1, 2], "text"); anything else is a string, so that paths need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    except RecursionError:
        raise ValueError(f"--set {override}: nested deeper than {texts.DEEPEST} levels") from None
    except ValueError:
        raise ValueError(f"--set {override}: an integer of thousands of digits; integers have 64 bits") from None
    if parsed.keys() != {"value"}:  # a line break in the text begins another key
        return text
    if "#" in text and "\n" not in text:
        try:
            tomllib.loads(f"value = [ {text} ]")
        except tomllib.TOMLDecodeError:  # a comment has swallowed the bracket, and would be dropped
            return text
    return parsed["value"]


def explain(error: ValidationError, root: type[BaseModel] = Recipe) -> str:
    """A line for each of pydantic's problems with a file of settings: key, value, reason, and the nearest known key. root: what it is."""
    problems = error.errors()
    more = [f"  and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    return "\n".join([*(_explained(problem, root) for problem in problems[:MOST_PROBLEMS]), *more])


def _explained(problem: Mapping[str, Any], root: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = texts.shown(".".join(location) or "(recipe)")[1:-1]
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], root)
        near = texts.nearest(location[-1], known)
        suggestion = f"did you mean {'.'.join([*location[:-1], near[0]])!r}? " if near else ""
        return f"  {key}: unknown key; {suggestion}known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"  {key}: missing; every {'recipe' if root is Recipe else 'file of this kind'} has to give it"
    reason = problem["msg"].removeprefix("Value error, ")
    value = "" if isinstance(problem["input"], dict) else f" = {texts.shown(problem['input'])}"
    return f"  {key}{value}: {reason}"


def _known_keys(section: list[str], root: type[BaseModel]) -> list[str]:
    model: type[BaseModel] | None = root
    names = iter(section)
    for name in names:
        field = None if model is None else model.model_fields.get(name)
        if field is None:
            return []
        annotations: Sequence[Any] = union_members(field.annotation)
        if tables := [get_args(option)[1] for option in annotations if get_origin(option) is dict]:
            next(names, None)  # the name that the recipe gave to an entry of this table
            annotations = [option for table in tables for option in union_members(_plain(table))]
        model = next((option for option in annotations if isinstance(option, type) and issubclass(option, BaseModel)), None)
    return [] if model is None else list(model.model_fields)


def _takes_a_table(path: Sequence[str], root: type[BaseModel]) -> bool:
    """Whether the key is one that has a value or a table of names, as data.train."""
    model: type[BaseModel] | None = root
    for name in path[:-1]:
        options = union_members(model.model_fields[name].annotation) if model is not None and name in model.model_fields else []
        model = next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)
    field = None if model is None else model.model_fields.get(path[-1])
    return field is not None and any(get_origin(_plain(option)) is dict for option in union_members(field.annotation))


def _plain(annotation: Any) -> Any:
    """The type of an Annotated one."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Lines 'key: old -> new' for each setting that changes what is learned; empty when a run of `old` may go on as `new` unsaid."""
    return [f"{key}: {before!r} -> {after!r}" for key, before, after in _changed(old, new)]


def refused(old: Recipe, new: Recipe) -> list[str]:
    """The lines of `differences` for which a run of `old` must not go on as `new`, with the reason where the key alone is none."""
    lines = _other_sources(old, new)
    for key, before, after in _changed(old, new):
        if resume.change(key) == "refused":
            lines.append(f"{key}: {before!r} -> {after!r}")
        elif key.endswith(".store") and IN_SHARDS in (before, after):
            lines.append(f"{key}: {before!r} -> {after!r} (other augmentations, and embeddings of another origin)")
        elif key == "optim.steps" and new.optim.schedule == "cosine":
            lines.append(f"{key}: {before!r} -> {after!r} (with schedule = {new.optim.schedule!r} the rate of every step depends on it)")
        elif key == "optim.steps":
            open_ended = [name for name, schedule in new.schedules.items() if schedule.end is not None and schedule.to_step is None]
            lines += [f"{key}: {before!r} -> {after!r} (schedules.{name} moves until then: give it a to_step)" for name in open_ended[:1]]
    if new.teacher is not None and new.teacher.store == IN_SHARDS and list(old.ensemble) != list(new.ensemble):
        lines.append(f"the order of [ensemble]: {list(old.ensemble)} -> {list(new.ensemble)}, by which each teacher has its part of a row")
    return lines


def _other_sources(old: Recipe, new: Recipe) -> list[str]:
    """Where the names of data.train's sources change, by which each is shuffled, or where there are names on one side alone."""
    before, after = (list(recipe.data.train) if isinstance(recipe.data.train, dict) else None for recipe in (old, new))
    shown = [f"sources {', '.join(names)}" if names else "shards without names" for names in (before, after)]
    return [f"data.train: {shown[0]} -> {shown[1]}"] if before != after else []


def told(old: Recipe, new: Recipe) -> list[str]:
    """What is to be said of the settings that may change, when `refused` has none."""
    changed = _changed(old, new)
    return [f"{key}: {before!r} -> {after!r}: {resume.TOLD.get(resume.entry(key) or '', 'changed')}" for key, before, after in changed]


def _changed(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    before, after = (texts.flat(credentials.redacted(recipe.model_dump(mode="json"))) for recipe in (old, new))
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [(key, before.get(key), after.get(key)) for key in keys if resume.change(key) != "free"]
