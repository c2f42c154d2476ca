"""From the patterns of a recipe to the names of shards: '::' joins, braces, local globs."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections.abc import Iterator, Mapping

from megakd.data.storage import INDEX, SET_INDEX, Stat, is_remote, local_path, shown, stat_all

# {00000..01243}, {10..1}, {0..90..10}, {a..e}
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])")
# A typo such as {0..99999999999} must not fill the memory; the largest public sets have some 10**5 shards.
_MOST_SHARDS = 1_000_000
_DEEPEST, _MOST_BRACES = 50, 500  # more would take long to expand
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))$")

_CHAINED = ("simplecache", "filecache", "blockcache", "cached")

log = logging.getLogger("megakd.data")


def expand(patterns: str | list[str]) -> list[str]:
    """The shards that the patterns name, in order; every one of them exists.

    Local paths and fsspec URLs; braces as in bash (`{00000..01243}` keeps its zeros, steps and letters, `{a,b}`, nested), lists, `::`
    between sources; in local paths `*`, `?`, `[]`, `**` and `~`. Of what a `*` finds, the .tar files are taken, the rest is logged. Raises
    ValueError for a missing shard, one that is named twice, a pattern that cannot be followed, and an empty set.
    """
    return [name for name, _ in expand_with_stats(patterns)]


def expand_with_stats(patterns: str | list[str]) -> list[tuple[str, Stat]]:
    """As `expand`, with the size and stamp of each shard."""
    named = []
    sources = [patterns] if isinstance(patterns, str) else patterns
    for pattern in (part.strip() for source in sources for part in source.split("::") if part.strip()):
        depths = itertools.accumulate(1 if letter == "{" else -1 if letter == "}" else 0 for letter in pattern)
        if max(depths) > _DEEPEST or pattern.count("{") > _MOST_BRACES:
            raise ValueError(f"{pattern[:60]!r}...: its braces are too many or nested too deeply: give a list of patterns")
        if _count(pattern) > _MOST_SHARDS:
            raise ValueError(f"{pattern!r} names more than {_MOST_SHARDS} shards: check its braces")
        named += [(name, pattern) for name in _names(pattern)]
        if len(named) > _MOST_SHARDS:
            raise ValueError(f"{pattern!r} brings the set to more than {_MOST_SHARDS} shards: check its braces")
    if not named:
        raise ValueError(f"data: {patterns!r} names no shard; give paths or URLs of .tar files")
    _refuse_twice(named)
    shards: list[tuple[str, Stat]] = []
    for (name, pattern), stat in zip(named, stat_all([name for name, _ in named]), strict=True):
        if stat is None:
            raise ValueError(_missing(name, pattern))
        shards.append((name, stat))
    return shards


def expand_sources(sources: Mapping[str, str | list[str]]) -> dict[str, list[tuple[str, Stat]]]:
    """As `expand_with_stats` of each source by its name. Raises ValueError, naming the source, also for a shard that two of them name."""
    found = {}
    for source, patterns in sources.items():
        try:
            found[source] = expand_with_stats(patterns)
        except ValueError as error:
            raise ValueError(f"source {source}: {error}") from error
    _refuse_twice([(name, f"source {source}") for source, shards in found.items() for name, _ in shards])
    return found


def _refuse_twice(named: list[tuple[str, str]]) -> None:
    first: dict[str, str] = {}
    for name, pattern in named:
        same = name if is_remote(name) else os.path.abspath(name)
        if same in first:
            by = repr(pattern) if first[same] == pattern else f"{first[same]!r} and by {pattern!r}"
            raise ValueError(f"{shown(name)} is named twice, by {by}: its samples would count double; name it once")
        first[same] = pattern


def _names(pattern: str) -> Iterator[str]:
    for name in _braces(pattern):
        if is_remote(name):
            # '?' also begins the query of a signed URL; only a star is surely meant as a glob
            if "*" in name:
                raise ValueError(f"{name}: globs work for local paths alone; name remote shards with braces, as in {{00000..00099}}.tar")
            yield name
            continue
        name = local_path(name)
        if not name.endswith(".tar") and os.path.isdir(name):  # a folder that is called so is refused by `stat`, without asking twice
            raise ValueError(f"{name} (of {pattern!r}) is a folder: name its shards, for example {os.path.join(name, '*.tar')}")
        if not glob.has_magic(name) or os.path.exists(name):
            yield name
        else:
            yield from _matches(name, pattern)


def _matches(name: str, pattern: str) -> list[str]:
    """The .tar files that a glob finds; all that it finds where none ends so."""
    if any("**" in part and part != "**" for part in name.split("/")):
        raise ValueError(
            f"{pattern!r}: '**' stands for folders at any depth and has to be a whole part of the path, as in 'shards/**/*.tar'"
        )
    matches = [match for match in sorted(glob.glob(name, recursive=True)) if not match.endswith((INDEX, SET_INDEX))]
    if packed := [match for match in matches if _COMPRESSED.search(match.lower())]:
        raise ValueError(
            f"{pattern!r} finds {len(packed)} compressed tars ({shown(packed[0])}), samples of which cannot be read out of order: "
            f"unpack them, or name the .tar files alone"
        )
    tars = [match for match in matches if match.lower().endswith(".tar")] or matches
    if left := sorted(set(matches) - set(tars)):
        log.warning("%r: %d files are no .tar and are left out: %s", pattern, len(left), ", ".join(map(shown, left[:3])))
    if not tars:
        raise ValueError(_missing(name, pattern))
    return tars


def _listed(pattern: str, start: int, end: int, commas: list[int]) -> list[str]:
    """The parts of a list in braces, each a pattern of its own."""
    return [pattern[one + 1 : other] for one, other in itertools.pairwise([start, *commas, end])]


def _count(pattern: str) -> int:
    """How many words `_braces` gives, without making them."""
    for start, end, commas in _pairs(pattern):
        if commas:
            return sum(map(_count, _listed(pattern, start, end, commas))) * _count(pattern[end + 1 :])
        if (span := _span(pattern[start + 1 : end])) is not None:
            return sum(1 for _ in span) * _count(pattern[end + 1 :])
    return 1


def _braces(pattern: str) -> Iterator[str]:
    """The words of a pattern, as bash expands braces; a pair with neither comma nor range stays as it is."""
    for start, end, commas in _pairs(pattern):
        inside, tail = pattern[start + 1 : end], pattern[end + 1 :]
        if commas:
            words: Iterator[str] = (word for part in _listed(pattern, start, end, commas) for word in _braces(part))
        elif (span := _span(inside)) is not None:
            words = span
        else:
            continue
        yield from (pattern[:start] + word + end_of_word for word in words for end_of_word in _braces(tail))
        return
    if ".." in pattern and re.search(r"\{[^{}]*\.\.|\.\.[^{}]*\}", pattern):
        raise ValueError(f"{pattern!r}: its braces are no list and no range; write {{00000..00099}}, {{a,b}}, or both as {{{{0..9}},20}}")
    yield pattern


def _pairs(pattern: str) -> Iterator[tuple[int, int, list[int]]]:
    """(opening, closing, its own commas) of each pair of braces, in order of opening."""
    open_at: list[tuple[int, list[int]]] = []
    pairs: list[tuple[int, int, list[int]]] = []
    for place, letter in enumerate(pattern):
        if letter == "{":
            open_at.append((place, []))
        elif letter == "," and open_at:
            open_at[-1][1].append(place)
        elif letter == "}" and open_at:
            start, commas = open_at.pop()
            pairs.append((start, place, commas))
    return iter(sorted(pairs))


def _span(inside: str) -> Iterator[str] | None:
    """The words of a range; None for anything else."""
    if (letters := _LETTERS.fullmatch(inside)) is not None:
        first, last = map(ord, letters.groups())
        step = 1 if first <= last else -1
        return (chr(code) for code in range(first, last + step, step))
    numbers = _NUMBERS.fullmatch(inside)
    if numbers is None:
        return None
    lower, upper, by = numbers.groups()
    if max(len(lower), len(upper)) > 18 or abs(int(upper) - int(lower)) >= _MOST_SHARDS * abs(int(by or 1)):
        raise ValueError(f"{{{inside}}} names more than {_MOST_SHARDS} shards, or a step of 0: check the range")
    padded = any(len(bound.lstrip("-")) > 1 and bound.lstrip("-").startswith("0") for bound in (lower, upper))
    width = max(len(lower), len(upper)) if padded else 0
    step = abs(int(by or 1)) * (1 if int(lower) <= int(upper) else -1)
    return (f"{number:0{width}d}" for number in range(int(lower), int(upper) + (1 if step > 0 else -1), step))


def _missing(name: str, pattern: str) -> str:
    name = shown(name)
    of = "" if name == pattern else f" (of {pattern!r})"
    world = re.match(r"(.*data/shapes)/", name)
    if world is not None and not os.path.exists(f"{world[1]}/world.json"):
        remedy = f"make the procedural set with `megakd shapes {world[1]} --train 20000 --test 2000`"
    elif "$" in name:
        remedy = "variables such as $HOME are not replaced: write the path out"
    elif name in _CHAINED:
        remedy = "'::' joins sources here; fsspec's chained URLs are not read: set data.cache for local copies of remote shards"
    elif is_remote(name):
        remedy = "check the URL, the braces' range and the credentials"
    else:
        remedy = f"check the path and the braces' range (the current folder is {os.getcwd()})"
    return f"no shard {name}{of}: {remedy}"
