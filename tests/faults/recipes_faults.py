"""Recipe files as editors, tools and people leave them: bytes, structure, values, and where they lie."""

from __future__ import annotations

import functools
import json
import random
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.campaign import Mutant
from faults.damage import flipped
from faults.sets_faults import TEXTS
from faults.tiny_commands import recipe_in, tried

NAME, COUNT, LIMIT, FEW = "recipes", 320, 90.0, 16

LINES = (
    *("seed = 1", "sead = 1", "seed = 1979-05-27", "seed = 9223372036854775807", "seed = -1", "seed = 1.0", 'seed = "1"', "seed = [1]"),
    *("= 1", "[[data]]", "[optim", "[optim]]", "[]", "[a.b.c]", "data = 3", "teacher = {}", "kernels.ring = true"),
    *("name = 'other'", 'name = ".."', 'name = "a/b"', "name = ''", 'name = "x\\u0000"', "kernels.backend = 'triton'"),
    *("views.crop_scale = [0.5]", "views.crop_ratio = [1e-9, 1e9]", "views.crop_scale = [1e-12, 1e-12]", "optim.betas = [1.0, 1.0]"),
    *("data.workers = 100000000000000000000", "data.workers = 1025", "data.block = 1000000000", "data.window = 1000000000"),
    *("data.max_pixels = 1", "data.max_bad_fraction = nan", "checkpoint.keep = 1000000000", "log.every = 0"),
    *("evaluation.batch = 1000000", "watchdog.limit = inf", "watchdog.limit = 1e300", "student.max_scale = 1e300"),
    *("optim.eps = 1e300", "optim.lr = 1e300", "optim.clip = 5e-324"),
)


def _bytes(text: str, draw: random.Random) -> tuple[str, bytes]:
    content = text.encode()
    place = draw.randrange(len(content))
    kinds: dict[str, Callable[[], bytes]] = {
        "cut off": lambda: content[:place],
        "flipped bit": lambda: flipped(content, place, draw),
        "byte order mark": lambda: b"\xef\xbb\xbf" + content,
        "UTF-16": lambda: text.encode("utf-16"),
        "Latin-1": lambda: content.replace(b"tiny", b"tin\xff", 1),
        "Windows line ends": lambda: content.replace(b"\n", b"\r\n"),
        "old Mac line ends": lambda: content.replace(b"\n", b"\r"),
        "NUL": lambda: content[:place] + b"\0" + content[place:],
        "form feed": lambda: content[:place] + b"\f" + content[place:],
        "empty": lambda: b"",
        "only comments": lambda: b"# nothing\n",
        "twice": lambda: content + content,
        "as JSON": lambda: json.dumps(tomllib.loads(text)).encode(),
        "as YAML": lambda: content.replace(b" = ", b": "),
        "17 MB of comments": lambda: content + b"# comment\n" * 1_700_000,
        "deep arrays": lambda: content + b"\n[x]\ny = " + b"[" * 5000 + b"]" * 5000,
        "deep tables": lambda: content + b"\n[" + b".".join([b"a"] * 5000) + b"]\n",
        "tables 60 deep in a free one": lambda: content + b"\n[student.architecture." + b".".join([b"a"] * 60) + b"]\nx = 1\n",
    }
    name = draw.choice(list(kinds))
    return name, kinds[name]()


def _line(text: str, draw: random.Random) -> tuple[str, bytes]:
    lines = text.splitlines()
    line = f"{draw.choice(('seed', 'optim.lr', 'data.train', 'name', 'data.cache'))} = {draw.choice(TEXTS)}"
    line = draw.choice(LINES) if draw.random() < 0.6 else line
    place = 0 if draw.random() < 0.7 else draw.randrange(len(lines))
    lines.insert(place, line)
    return f"{line[:100]!r} in line {place + 1}", "\n".join(lines).encode("utf-8", "surrogatepass")


def _key(text: str, draw: random.Random) -> tuple[str, bytes]:
    """One line deleted, misspelt or given another value."""
    lines = text.splitlines()
    place = draw.choice([number for number, line in enumerate(lines) if "=" in line])
    key, _, value = lines[place].partition("=")
    name = key.strip()
    cut = draw.randrange(len(name))
    done = draw.choice(["deleted", "misspelt", "valued", "valued"])
    if done == "deleted":
        del lines[place]
    elif done == "misspelt":
        lines[place] = f"{name[:cut]}{draw.choice('xyz_')}{name[cut + 1 :]} ={value}"
    else:
        lines[place] = f"{key}= {draw.choice(TEXTS)}"
    return f"{name} {done}: {lines[min(place, len(lines) - 1)][:100]!r}", "\n".join(lines).encode("utf-8", "surrogatepass")


def _run_json(text: str, draw: random.Random) -> tuple[str, bytes]:
    recipe: Any = tomllib.loads(text)
    contents: tuple[tuple[str, Any], ...] = (
        ("run.json", {"recipe": recipe}),
        ("recipe: null", {"recipe": None}),
        ("recipe: list", {"recipe": [recipe]}),
        ("recipe: text", {"recipe": "tiny"}),
        ("recipe: number", {"recipe": 3}),
        ("list", [recipe]),
        ("null", None),
        ("recipe with an unknown key", {"recipe": {**recipe, "later": 1}}),
        ("recipe with an infinity", {"recipe": {**recipe, "seed": float("inf")}}),
        ("recipe with a huge integer", {"recipe": {**recipe, "seed": 10**30}}),
    )
    name, content = draw.choice(contents)
    made = json.dumps(content).encode()
    if draw.random() < 0.3:
        made = made[: draw.randrange(len(made) + 1)]
        name += ", cut off"
    return f"JSON, {name}", made


def _place(folder: Path, draw: random.Random) -> tuple[str, Path]:
    """Names that are no file, or none of ours."""
    (folder / "a_folder.toml").mkdir(exist_ok=True)
    (folder / "loop.toml").is_symlink() or (folder / "loop.toml").symlink_to("loop.toml")
    here = [folder, *(folder / name for name in ("a_folder.toml", "loop.toml", "none.toml"))]
    other = ["tiny.toml", "smok", ".", "/dev/null", "/proc/self/mem", "a\x00b.toml", "\udcff.toml"]
    other += ["x" * 300 + ".toml", "/" + "y/" * 2500 + "z.toml"]
    path = draw.choice([*here, *map(Path, other)])
    return f"--recipe {str(path)[:80]!r}", path


KINDS = (_bytes, _line, _line, _key, _key, _run_json)


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    text = recipe_in(folder).read_text(encoding="utf-8")
    for number in range(count):
        if draw.random() < 0.08:
            name, path = _place(folder, draw)
        else:
            kind = draw.choice(KINDS)
            name, content = kind(text, draw)
            path = folder / f"{number}.{'json' if kind is _run_json else 'toml'}"
            path.write_bytes(content)
        yield Mutant(f"{number}: {name}", functools.partial(tried, path, out=folder / f"run{number}"))
