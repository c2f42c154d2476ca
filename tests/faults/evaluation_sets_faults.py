"""Evaluation sets as other people make them: class names, templates, labels, captions, false captions and pictures, damaged one by one.

The model reads every picture and every sentence, so a sound set scores 100 %, and of n samples of which k cannot be read exactly k are
wrong, counted, and more than data.max_bad_fraction allows unless that is 1.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.campaign import Mutant, SilentFault
from support.numbered_pictures import picture, recipe, results
from support.shards import bomb_png, write_tar

NAME, COUNT, LIMIT, FEW = "evaluation_sets", 300, 20.0, 24
SAMPLES = 12
KINDS = ("zero_shot", "retrieval", "hard_negatives")
REFUSED = -1  # in the place of the number of samples that are lost

# Bytes to put in a member's or file's place, and what that makes of it: sound, lost, or a set that has to be refused.
SOUND, LOST, REFUSE = "sound", "lost", "refuse"
Damage = tuple[str, Callable[[int, bytes], bytes | None], str]


def _fixed(name: str, content: bytes | None, outcome: str) -> Damage:
    return name, lambda number, original: content, outcome


def _each(what: str, outcome: str, *contents: bytes) -> list[Damage]:
    return [_fixed(f"the {what} {content[:40]!r}", content, outcome) for content in contents]


PICTURES: list[Damage] = [
    _fixed("no picture", None, LOST),
    _fixed("an empty picture", b"", LOST),
    _fixed("an error page for a picture", b"<html><body>404 Not Found</body></html>", LOST),
    _fixed("an SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>', LOST),
    _fixed("an EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", LOST),
    _fixed("a bomb", bomb_png(60_000, 60_000), LOST),
    _fixed("a thin picture", bomb_png(60_000, 1), LOST),
    _fixed("zeros", bytes(700), LOST),
    ("a cut picture", lambda number, original: original[: len(original) // 2], LOST),
    ("a cut header", lambda number, original: original[:20], LOST),
    ("a picture saved again", lambda number, original: picture(number, compress_level=number % 9), SOUND),
    ("bytes after the picture", lambda number, original: original + b"trailing", SOUND),
]
CAPTIONS: list[Damage] = [
    _fixed("no caption", None, LOST),
    _fixed("an empty caption", b"", LOST),
    _fixed("white space", b" \r\n\t ", LOST),
    _fixed("latin-1", "12 café".encode("latin-1"), LOST),
    _fixed("UTF-16", "12 café".encode("utf-16"), LOST),
    ("several lines", lambda number, original: b"%d a\r\n%d b\n%d c" % ((number,) * 3), SOUND),
    ("a long one", lambda number, original: original + b" word" * 20_000, SOUND),
    ("NUL after it", lambda number, original: original + b" \0 \0", LOST),
    ("escapes", lambda number, original: original + b" \x1b[31m{c} {} %s <end>", SOUND),
]
LABELS: list[Damage] = [
    _fixed("no label", None, REFUSE),
    *_each("label", REFUSE, b"", b"cat", b"-1", b"12", b"99999999999999999999", b"9" * 5000, b"1.0", b"1e0", b"1_0"),
    *_each("label", REFUSE, "١".encode(), b"0x1", b"1 2", b"[1]", b"nan", b"True", b"\x80\x04K\x01.", b"\x93NUMPY\x01\0", b"\xff"),
    ("a line break", lambda number, original: original + b"\r\n", SOUND),
    ("a byte order mark", lambda number, original: b"\xef\xbb\xbf" + original, SOUND),
    ("zeros before it", lambda number, original: b"00" + original, SOUND),
]
SWAPS = (
    *(b"[]", b'["99 a", 3]', b'["99 a", ""]', b'{"text": "99 a"}', b"99", b"NaN", b'""', b'" \\n"', b"true", b"9" * 5000),
    '"99 é"'.encode("latin-1"),
)
FALSE: list[Damage] = [
    _fixed("no json", None, REFUSE),
    *_each("json", REFUSE, b"", b"{", b"[]", b"null", b'"negatives"', b"[" * 90_000, b'{"negatives":' * 90_000, b"\xff\xfe{}"),
    *_each("json", REFUSE, b'{"negatives": ["99 a"]}', b'{"negatives": "99 a"}', b'{"negatives": null}'),
    *_each("json", REFUSE, *(b'{"negatives": {"swap": %s}}' % value for value in SWAPS)),
    *_each("json", SOUND, b'{"negatives": {"swap": ["99 a", "98 b"]}}'),
    ("a byte order mark", lambda number, original: b"\xef\xbb\xbf" + original, SOUND),
    ("more keys", lambda number, original: original[:-1] + b', "url": null, "width": 1e999}', SOUND),
]
NAMES = "\n".join(map(str, range(SAMPLES))).encode()
CLASS_NAMES: list[Damage] = [
    _fixed("no class names", None, REFUSE),
    _fixed("empty class names", b"", REFUSE),
    _fixed("blank class names", b"\n\n \n", REFUSE),
    _fixed("too few class names", b"\n".join(NAMES.split(b"\n")[:-1]), REFUSE),
    _fixed("class names in latin-1", NAMES.replace(b"7", b"7 caf\xe9"), REFUSE),
    _fixed("class names in UTF-16", NAMES.decode().encode("utf-16"), REFUSE),
    _fixed("an empty line among the class names", NAMES.replace(b"\n7\n", b"\n\n7\n"), REFUSE),
    _fixed("an empty line before the class names", b"\n" + NAMES, REFUSE),
    _fixed("a form feed in a class name", NAMES.replace(b"7", b"7 a\x0cb"), REFUSE),
    _fixed("a line separator in a class name", NAMES.replace(b"7", "7 a\u2028b".encode()), REFUSE),
    _fixed("NUL in a class name", NAMES.replace(b"7", b"7\0"), REFUSE),
    _fixed("a byte order mark", b"\xef\xbb\xbf" + NAMES, SOUND),
    _fixed("CRLF", NAMES.replace(b"\n", b"\r\n"), SOUND),
    _fixed("line breaks of old Macs", NAMES.replace(b"\n", b"\r"), SOUND),
    _fixed("empty lines after the class names", NAMES + b"\n\n  \n", SOUND),
    _fixed("white space around the class names", NAMES.replace(b"\n", b" \t\n  "), SOUND),
    _fixed("braces in a class name", NAMES.replace(b"7", b"7 {c} {} {0}"), SOUND),
    _fixed("more class names than labels", NAMES + b"\n99 more", SOUND),
]
TEMPLATES: list[Damage] = [
    _fixed("no templates", None, REFUSE),
    *_each("templates", REFUSE, b"", b"\n", b"a photo", b"{}", b"{C}", b"{c", b"{{c}}", b"{c} {", b"{c}\n{}", b"{c}\n\n{c} b"),
    *_each("templates", REFUSE, b"{c!r}", b"{0}", b"%s", b"{c}\0", b"{c} caf\xe9"),
    *_each("templates", SOUND, b"{c}", b"\xef\xbb\xbf{c}", b"{c}\r\n{c} a\r\n", b"{c} {c}\n{c} and\n\n", "{c} – é".encode(), b"{c} %s $c"),
]
OF_KIND: dict[str, list[tuple[str, list[Damage]]]] = {
    "zero_shot": [("png", PICTURES), ("cls", LABELS), ("names", CLASS_NAMES), ("templates", TEMPLATES)],
    "retrieval": [("png", PICTURES), ("txt", CAPTIONS)],
    "hard_negatives": [("png", PICTURES), ("txt", CAPTIONS), ("json", FALSE)],
}


@dataclass
class Set:
    """Members by sample and extension, and what lies beside the tar."""

    kind: str
    members: list[dict[str, bytes]]
    names: bytes | None = NAMES
    templates: bytes | None = b"{c} it is\n{c}\n"

    def write(self, folder: Path) -> str:
        rows = [(f"{row:04d}.{kind}", data) for row, sample in enumerate(self.members) for kind, data in sample.items()]
        write_tar(folder / "test" / "0.tar", rows)
        if self.kind != "zero_shot":
            return f"{folder}/test/*.tar"
        for name, content in (("classnames.txt", self.names), ("zeroshot_classification_templates.txt", self.templates)):
            if content is not None:
                (folder / name).write_bytes(content)
        return str(folder)


def _sound(kind: str) -> Set:
    beside: dict[str, Callable[[int], dict[str, bytes]]] = {
        "zero_shot": lambda number: {"cls": b"%d" % number},
        "retrieval": lambda number: {"txt": b"%d a\n%d b" % (number, number)},
        "hard_negatives": lambda number: {"txt": b"%d a" % number, "json": json.dumps({"negatives": {"swap": "99 a"}}).encode()},
    }
    return Set(kind, [{"png": picture(number), **beside[kind](number)} for number in range(SAMPLES)])


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        part, damages = draw.choice(OF_KIND[kind])
        name, change, outcome = draw.choice(damages)
        made, rows = _sound(kind), sorted(draw.sample(range(SAMPLES), draw.choice((1, 1, 2, 3))))
        if part in ("names", "templates"):
            setattr(made, part, change(0, b""))
            rows = []
        for row in rows:
            content = change(row, made.members[row].pop(part))
            if content is not None:
                made.members[row] = {part: content, **made.members[row]} if draw.random() < 0.5 else {**made.members[row], part: content}
        lost = REFUSED if outcome == REFUSE else len(rows) if outcome == LOST else 0
        strict = draw.random() < 0.4
        said = f"{kind}: {name}{f' in samples {rows}' if rows else ''}{', none may be lost' if strict else ''}"
        yield Mutant(said, _attempt(made, folder / str(number), REFUSED if strict and lost else lost, 0.0 if strict else 1.0))


def _attempt(made: Set, folder: Path, lost: int, allowed: float) -> Callable[[], str]:
    def attempt() -> str:
        where = made.write(folder)
        try:
            found = results(recipe(allowed, **{made.kind: {"mine": where}}))[made.kind]["mine"]
        except ValueError:
            if lost != REFUSED:
                raise SilentFault("refused, though it can be scored") from None
            raise
        if lost == REFUSED:
            raise SilentFault(f"scored, though it cannot be: {found}")
        if _told(made.kind, found) != (lost, 1 - lost / SAMPLES):
            raise SilentFault(f"{lost} of {SAMPLES} samples cannot be read, and it says {found}")
        return "told" if lost else "sound"

    return attempt


def _told(kind: str, found: dict[str, Any]) -> tuple[int, float]:
    """How many samples could not be read, and the share of images that the model got right."""
    if kind == "zero_shot":
        return found["unreadable"], found["top1"]
    if kind == "hard_negatives":
        return found["swap"]["unreadable"], found["swap"]["accuracy"]
    return found["unreadable"], round(found["image_to_text"]["R@1"] * found["images"]) / SAMPLES
