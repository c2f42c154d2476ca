"""Ways to damage a file that families share: bytes of any file, values of JSON and of safetensors' headers."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a JSON value may be changed to. Deep nesting, other encodings and the like are in `json_text`.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 19, 1.5, -0.0, 1e308, 10**20, 2**63, -(10**20), float("nan"), float("inf")),
    *("", "x", "0", "\x00", "é", [], [1], {}, {"a": 1}, [[[]]], "9" * 5000),
)
Damage = tuple[str, Callable[[], None]]


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
        content[first : first + length], content[second : second + length] = (
            content[second : second + length],
            content[first : first + length],
        )
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


def json_value(content: Any, draw: random.Random) -> str:
    """Change, delete, rename or copy one entry somewhere in a JSON object, in place, and say which."""
    places = list(_places(content, ""))
    holder, key, name = draw.choice(places)
    kind = draw.choice(("change", "change", "change", "near", "delete", "rename", "move"))
    value = holder[key]
    if kind == "near" and type(value) in (int, float):
        holder[key] = value + draw.choice((1, -1, 10, 0.5))
        return f"{name} = {value!r} becomes {holder[key]!r}"
    if kind == "near" and isinstance(value, str) and value:
        place = draw.randrange(len(value))
        holder[key] = value[:place] + chr(ord(value[place]) ^ 1) + value[place + 1 :]
        return f"{name}: one letter becomes another"
    if kind == "delete":
        del holder[key]
        return f"{name} deleted"
    if kind == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
        return f"{name} renamed"
    if kind == "move":
        other, at, where = draw.choice(places)
        moved = json.loads(json.dumps(value))
        other[at] = moved
        return f"{where} becomes what {name} is"
    holder[key] = draw.choice(VALUES)
    return f"{name} becomes {str(holder[key])[:40]!r}"


def _places(tree: Any, prefix: str) -> Any:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(entries):
        yield tree, key, f"{prefix}{key}"
        yield from _places(value, f"{prefix}{key}.")


def json_file(path: Path, draw: random.Random) -> str:
    """Damage a JSON file as a text, or one value in it."""
    text = path.read_text(encoding="utf-8")
    kind = draw.choice(("value",) * 8 + ("deep", "utf-16", "bom", "list", "twice", "huge", "latin", "nul"))
    if kind == "value":
        content = json.loads(text)
        name = json_value(content, draw)
        path.write_text(json.dumps(content), encoding="utf-8")
        return f"{path.name}: {name}"
    if kind == "deep":
        path.write_text("[" * 100_000 + "]" * 100_000)
    elif kind == "utf-16":
        path.write_text(text, encoding="utf-16")
    elif kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    elif kind == "list":
        path.write_text(f"[{text}]")
    elif kind == "twice":
        path.write_text(text + text)
    elif kind == "huge":
        path.write_text(text.replace(":", ": " + "9" * 5000 + ",", 1))
    elif kind == "latin":
        path.write_bytes(text.replace("e", "é", 1).encode("latin-1"))
    else:
        path.write_text(text.replace(" ", "\x00", 3))
    return f"{path.name}: {kind}"


def header(path: Path, draw: random.Random) -> str:
    """Change a value in the header of a safetensors file, whose tensors stay."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    tree = json.loads(content[8 : 8 + length])
    tensors = [key for key in tree if key != "__metadata__"]
    kind = draw.choice(("value", "value", "exchange", "offsets", "note", "length"))
    if kind == "exchange":
        one, other = draw.sample(tensors, 2)
        field = draw.choice(("data_offsets", "shape", "dtype"))
        tree[one][field], tree[other][field] = tree[other][field], tree[one][field]
        name = f"{field} of {one} and {other} exchanged"
    elif kind == "offsets":
        one = draw.choice(tensors)
        by = draw.choice((1, 2, 8, -2))
        tree[one]["data_offsets"] = [max(0, offset + by) for offset in tree[one]["data_offsets"]]
        name = f"{one} moved by {by}"
    elif kind == "note" and "megakd" in tree.get("__metadata__", {}):
        note = json.loads(tree["__metadata__"]["megakd"])
        name = f"note: {json_value(note, draw)}"
        tree["__metadata__"]["megakd"] = json.dumps(note)
    elif kind == "length":
        length_said = draw.choice((0, length - 1, length + 1, 2**32, 2**63))
        path.write_bytes(struct.pack("<Q", length_said) + content[8:])
        return f"{path.name}: header's length becomes {length_said}"
    else:
        name = json_value(tree, draw)
    text = json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return f"{path.name}: header: {name}"
