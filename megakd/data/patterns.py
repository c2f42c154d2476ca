"""From the patterns of a recipe to the names of shards: '::' joins, braces, local globs."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator

from megakd.data.storage import Stat, is_remote, local_path, stat_all

_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# A typo such as {0..99999999999} must not fill the memory; the largest public sets have some 10**5 shards.
_MOST_SHARDS = 1_000_000


def expand(patterns: str | list[str]) -> list[str]:
    """The shards that the patterns name, in order; every one of them exists.

    `{00000..01243}` (zero-padded), `{a,b}`, lists, `::` between sources, `*`, `?` and `[]` in local paths; local paths and
    fsspec URLs. A local path keeps its form. Raises ValueError for a missing shard and for an empty set.
    """
    return [name for name, _ in expand_with_stats(patterns)]


def expand_with_stats(patterns: str | list[str]) -> list[tuple[str, Stat]]:
    """As `expand`, with the size and stamp of each shard, so that remote ones are asked once."""
    found = [(name, pattern) for pattern in _sources(patterns) for name in _names(pattern)]
    if not found:
        raise ValueError(f"data: {patterns!r} names no shard; give paths or URLs of .tar files")
    shards: list[tuple[str, Stat]] = []
    for (name, pattern), stat in zip(found, stat_all([name for name, _ in found]), strict=True):
        if stat is None:
            raise ValueError(_missing(name, pattern))
        shards.append((name, stat))
    return shards


def _sources(patterns: str | list[str]) -> list[str]:
    listed = [patterns] if isinstance(patterns, str) else patterns
    return [part.strip() for pattern in listed for part in pattern.split("::") if part.strip()]


def _names(pattern: str) -> Iterator[str]:
    for name in _braces(pattern):
        if not is_remote(name):
            name = local_path(name)
            if os.path.isdir(name):
                raise ValueError(f"{name} (of {pattern!r}) is a folder: name its shards, for example {os.path.join(name, '*.tar')}")
        if not glob.has_magic(name) or (not is_remote(name) and os.path.exists(name)):
            yield name
        elif is_remote(name):
            # '?' also begins the query of a signed URL; only a star is surely meant as a glob
            if "*" in name:
                raise ValueError(f"{name}: globs work for local paths alone; name remote shards with braces, as in {{00000..00099}}.tar")
            yield name
        else:
            matches = sorted(glob.glob(name))
            if not matches:
                raise ValueError(_missing(name, pattern))
            yield from matches


def _braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for word in _words(match.group(1)):
        for rest in _braces(tail):
            yield head + word + rest


def _words(inside: str) -> Iterator[str]:
    span = _RANGE.fullmatch(inside)
    if span is None:
        yield from inside.split(",")
        return
    first, last = span.groups()
    if abs(int(last) - int(first)) >= _MOST_SHARDS:
        raise ValueError(f"{{{inside}}} names more than {_MOST_SHARDS} shards: check the range")
    padded = any(len(bound) > 1 and bound.startswith("0") for bound in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if int(first) <= int(last) else -1
    for number in range(int(first), int(last) + step, step):
        yield f"{number:0{width}d}"


def _missing(name: str, pattern: str) -> str:
    of = "" if name == pattern else f" (of {pattern!r})"
    if "data/shapes" in name.replace(os.sep, "/"):
        remedy = "make the procedural set with `megakd shapes data/shapes --train 20000 --test 2000`"
    elif is_remote(name):
        remedy = "check the URL, the braces' range and the credentials"
    else:
        remedy = f"check the path and the braces' range (the current folder is {os.getcwd()})"
    return f"no shard {name}{of}: {remedy}"
