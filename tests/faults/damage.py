"""Ways to damage a file that families share: bytes of any file, texts and values of JSON, headers of safetensors files."""

from __future__ import annotations

import copy
import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

from support import safetensors_files

# What a JSON value may be changed to. Deep nesting, other encodings and the like are in `json_text`.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 19, 0.5, 1.5, -0.0, 1e308, 10**20, 2**63, -(10**20), 10**400, float("nan"), float("inf")),
    *("", " ", "x", "0", "32", "auto", "true", "\x00", "é" * 300, "a\u2028b", "../x", "9" * 5000),
    *([], [1], [[[]]], {}, {"a": 1}, {"enabled": True}),
)
# Kinds of `json_text` that leave the content what it was.
HARMLESS = ("byte order mark", "Windows line ends", "escapes")


def flipped(content: bytes, place: int, draw: random.Random) -> bytes:
    """One bit of the byte at `place` is another."""
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def bytes_of(path: Path, draw: random.Random) -> str:
    """Damage some bytes of a file, and say how."""
    content = bytearray(path.read_bytes())
    size = len(content)
    kind = draw.choice(("flip", "flip", "flip", "flips", "truncate", "append", "empty", "zeros", "swap", "insert"))
    if kind in ("flip", "flips") and size:
        places = [draw.randrange(size * 8) for _ in range(1 if kind == "flip" else draw.randint(2, 9))]
        for place in places:
            content[place // 8] ^= 1 << place % 8
        name = f"bits {places} flipped"
    elif kind == "truncate" and size:
        end = draw.randrange(size)
        del content[end:]
        name = f"cut to {end} bytes"
    elif kind == "append":
        content += bytes(draw.randrange(256) for _ in range(draw.randint(1, 64)))
        name = f"{len(content) - size} bytes appended"
    elif kind == "zeros" and size:
        begin = draw.randrange(size)
        end = min(size, begin + draw.choice((1, 4, 64, 4096)))
        content[begin:end] = bytes(end - begin)
        name = f"zeros from {begin} to {end}"
    elif kind == "swap" and size > 8:
        length = draw.randint(1, min(64, size // 3))
        first, second = sorted((draw.randrange(size - 2 * length), draw.randrange(size - 2 * length)))
        second = max(second, first + length)
        one, other = content[first : first + length], content[second : second + length]
        content[first : first + length], content[second : second + length] = other, one
        name = f"{length} bytes at {first} and {second} exchanged"
    elif kind == "insert":
        place = draw.randint(0, size)
        content[place:place] = bytes([draw.randrange(256)])
        name = f"a byte inserted at {place}"
    else:
        content.clear()
        name = "emptied"
    path.write_bytes(content)
    return f"{path.name}: {name}"


def json_place(tree: Any, draw: random.Random) -> tuple[Any, Any, list[Any]]:
    """An entry somewhere in an object or list that is not empty: what holds it, its key there, and the keys that lead to it."""
    keys: list[Any] = []
    while True:
        key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        keys.append(key)
        if not (isinstance(tree[key], dict | list) and tree[key] and draw.random() < 0.7):
            return tree, key, keys
        tree = tree[key]


def json_value(content: Any, draw: random.Random, values: tuple[Any, ...] = VALUES) -> tuple[str, list[Any]]:
    """Change, delete or rename one entry somewhere in a JSON object, in place. Returns what was done, and the keys that lead to it."""
    holder, key, keys = json_place(content, draw)
    kind = draw.choice(("change", "change", "change", "near", "delete", "rename", "move"))
    name, value = ".".join(map(str, keys)), holder[key]
    if kind == "near" and type(value) in (int, float):
        holder[key] = value + draw.choice((1, -1, 10, 0.5))
    elif kind == "near" and isinstance(value, str) and value:
        place = draw.randrange(len(value))
        holder[key] = value[:place] + chr(ord(value[place]) ^ 1) + value[place + 1 :]
    elif kind == "delete":
        del holder[key]
        return f"{name} deleted", keys
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
        return f"{name} renamed", keys
    elif kind == "move":
        other, at, _ = json_place(content, draw)
        holder[key] = copy.deepcopy(other[at])
    else:
        holder[key] = copy.deepcopy(draw.choice(values))
    return f"{name} = {str(value)[:40]!r} becomes {str(holder[key])[:40]!r}", keys


def json_text(text: str, draw: random.Random) -> tuple[str, bytes]:
    """A JSON text as broken disks, editors and other tools leave it. Returns what was done, and the bytes."""
    content, levels = text.encode(), draw.choice((60, 3000, 100_000))
    place = draw.randrange(len(content))

    def number(other: str) -> bytes:
        return re.sub(r"(?<=: )-?[\d.]+", other, text, count=1).encode()

    kinds = {
        "flipped bit": flipped(content, place, draw),
        "cut": content[:place],
        "empty": b"",
        "byte order mark": b"\xef\xbb\xbf" + content,
        "UTF-16": text.encode("utf-16"),
        "UTF-32": text.encode("utf-32"),
        "Latin-1": text.replace("a", "é", 1).encode("latin-1", "replace"),
        "NUL": content[:place] + b"\0" + content[place:],
        "Windows line ends": content.replace(b"\n", b"\r\n"),
        "compressed": gzip.compress(content),
        "null": b"null",
        "a number": b"12",
        "a string": json.dumps(text).encode(),
        "a list": f"[{text}]".encode(),
        "twice": content + content,
        "more behind it": content + b" and more",
        "the same key twice": re.sub(r'"\w+": ', lambda key: f"{key[0]}7, {key[0]}", text, count=1).encode(),
        "trailing comma": text.replace("}", ",}", 1).encode(),
        "comment": f"// mine\n{text}".encode(),
        "single quotes": text.replace('"', "'").encode(),
        "NaN": number("NaN"),
        "Infinity": number("1e999"),
        "thousands of digits": number("9" * 5000),
        "escapes": text.replace("a", "\\u0061", 3).encode(),
        "a lone surrogate": text.replace("a", "\\ud800", 1).encode(),
        f"{levels} levels": ("[" * levels + "]" * levels).encode(),
        f"{levels} levels of objects": ('{"a":' * levels + "1" + "}" * levels).encode(),
        "objects without an end": b'{"a":' * levels,
    }
    kind = draw.choice([*kinds, "flipped bit", "flipped bit", "cut"])
    return f"{kind} at {place}" if kind in ("flipped bit", "cut", "NUL") else kind, kinds[kind]


def json_file(path: Path, draw: random.Random) -> str:
    """Damage a JSON file as a text, or one value in it."""
    text = path.read_text(encoding="utf-8")
    if draw.random() < 0.5:
        name, damaged = json_text(text, draw)
    else:
        content = json.loads(text)
        name, _ = json_value(content, draw)
        damaged = json.dumps(content).encode()
    path.write_bytes(damaged)
    return f"{path.name}: {name}"


def header(path: Path, draw: random.Random) -> str:
    """Change a value in the header of a safetensors file, whose tensors stay."""
    tree, data = safetensors_files.read(path)
    tensors = [key for key in tree if key != "__metadata__"]
    kind, more = draw.choice(("value", "value", "exchange", "offsets", "note", "length")), 0
    if kind == "exchange":
        one, other = draw.sample(tensors, 2)
        field = draw.choice(("data_offsets", "shape", "dtype"))
        tree[one][field], tree[other][field] = tree[other][field], tree[one][field]
        name = f"{field} of {one} and {other} exchanged"
    elif kind == "offsets":
        one, by = draw.choice(tensors), draw.choice((1, 2, 8, -2))
        tree[one]["data_offsets"] = [max(0, offset + by) for offset in tree[one]["data_offsets"]]
        name = f"{one} moved by {by}"
    elif kind == "note" and "megakd" in tree.get("__metadata__", {}):
        note = json.loads(tree["__metadata__"]["megakd"])
        name = f"note: {json_value(note, draw)[0]}"
        tree["__metadata__"]["megakd"] = json.dumps(note)
    elif kind == "length":
        more = draw.choice((-1, 1, 2**32, 2**63, -len(json.dumps(tree).encode())))
        name = f"its length is {more} more"
    else:
        name, _ = json_value(tree, draw)
    safetensors_files.write(path, tree, data, more)
    return f"{path.name}: header: {name}"
