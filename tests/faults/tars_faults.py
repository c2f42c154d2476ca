"""Damaged shards: what is used and what is counted as lost add up to the samples that were written, and no image gets another's caption.

Each sample's number is in its pixels and in its caption. The mutant knows which bytes belong to which sample, and so which are whole.
"""

from __future__ import annotations

import functools
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faults.campaign import Mutant, SilentFault
from megakd.data.bad_samples import BadSample
from megakd.data.pairs import opened_pair
from megakd.data.shards import ShardSet
from megakd.recipe import Data
from support.shards import png

NAME, COUNT, LIMIT = "tars", 3000, 20.0
END = 99

_KNOWN_AT_OPEN = ("missing_image", "missing_caption", "empty_caption")


@dataclass
class Original:
    """A sound tar. spans: (sample, start, data, end) of each member: its headers begin at `start`, its bytes lie in data .. end."""

    content: bytes
    samples: int
    spans: list[tuple[int, int, int, int]]
    layout: str


@dataclass
class Mutation:
    """slack: by how many samples a count may be off where nothing but bytes tells what lay there; END: the end is gone, and without
    statistics or neighbours nobody knows. over: by how many it may be too high. added: samples more than in the original."""

    what: str
    content: bytes
    slack: int = 0
    over: int = 0
    added: int = 0
    changed: set[int] = field(default_factory=set)  # samples whose data, not their headers, may differ


Mutate = Callable[[Original, random.Random], Mutation]


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    for number in range(count):
        original = _original(random.Random(draw.random()))
        kind = draw.choice(list(_KINDS))
        mutation = _KINDS[kind](original, draw)
        help_ = draw.choice(["stats", "neighbours", "alone"])
        place = folder / f"{number:05d}"
        name = f"{number}: {original.layout}, {original.samples} samples, {kind} ({mutation.what}), {help_}"
        yield Mutant(name, functools.partial(_attempt, original, mutation, help_, place))


def _attempt(original: Original, mutation: Mutation, help_: str, place: Path) -> str:
    place.mkdir()
    (place / "00000.tar").write_bytes(mutation.content)
    written = original.samples + mutation.added
    patterns, others = [str(place / "00000.tar")], 0
    if help_ == "stats":
        (place / "00000_stats.json").write_text(json.dumps({"count": written + 3, "successes": written}), encoding="utf-8")
    if help_ == "neighbours":
        for name in ("00001", "00002"):
            (place / f"{name}.tar").write_bytes(_written(random.Random(1), written, "pairs")[0])
            patterns.append(str(place / f"{name}.tar"))
        others = 2 * written
    verdicts = [_used_and_lost(patterns, original, mutation, written + others) for _ in range(2)]  # the second start has the index
    (used, lost), again = verdicts
    if again != verdicts[0]:
        raise SilentFault(f"{verdicts[0]} used and lost at the first start, {again} at the second")
    more = used + lost - written - others
    blind = help_ == "alone" and mutation.slack == END  # then one is all that can be said
    slack = 0 if help_ == "stats" or mutation.slack == END else mutation.slack
    if not (blind and lost) and not -slack <= more <= max(slack, mutation.over):
        raise SilentFault(f"{used} used and {lost} counted as lost of {written + others}")
    return "sound" if not lost else "told"


def _used_and_lost(patterns: list[str], original: Original, mutation: Mutation, written: int) -> tuple[int, int]:
    shards = ShardSet.open_set(patterns, Data.model_validate({"train": patterns}), 0, 1, lambda: None)
    used, lost = 0, shards.known_bad.total
    for index in range(len(shards)):
        try:
            sample = shards.read(index, ("image", "caption"))
            picture, captions = opened_pair(sample, shards.captions, Data(max_pixels=10_000))
        except BadSample as bad:
            lost += bad.reason not in _KNOWN_AT_OPEN
            if bad.reason == "empty_caption" and "no bytes" not in bad.detail:
                lost += 1
            continue
        used, text = used + 1, "" if captions is None else captions.texts[0]
        red, green, _ = picture.rgb().getpixel((1, 1))  # type: ignore[misc]
        number = red * 256 + green
        said = text.rpartition(" ")[2]
        if said != str(number) and number not in mutation.changed and not (said.isdigit() and int(said) in mutation.changed):
            raise SilentFault(f"image {number} with the caption {text[:60]!r}")
    return used, lost


def _png(number: int, draw: random.Random) -> bytes:
    side = draw.randint(4, 24)
    noise = b"".join(
        b"\0" + b"".join(bytes((number >> 8, number & 255, 0 if x < 3 and y < 3 else draw.randrange(256))) for x in range(side))
        for y in range(side)
    )
    return png(side, side, noise)


LAYOUTS = ("triples", "pairs", "captions first", "images first", "long names", "unicode", "gnu", "folders", "float dates")


def _original(draw: random.Random) -> Original:
    layout = draw.choice(LAYOUTS)
    samples = draw.randint(8, 30)
    content, spans = _written(draw, samples, layout)
    return Original(content, samples, spans, layout)


def _written(draw: random.Random, samples: int, layout: str) -> tuple[bytes, list[tuple[int, int, int, int]]]:
    members: list[tuple[int, str, bytes]] = []
    for number in range(samples):
        key = _key(number, layout)
        image = (number, f"{key}.png", _png(number, draw))
        caption = (number, f"{key}.txt", b"a picture with the number %d" % number)
        meta = (number, f"{key}.json", b'{"number": %d}' % number)
        members += {"pairs": [image, caption], "captions first": [caption, image]}.get(layout, [image, meta, caption])
    if layout == "images first":
        members.sort(key=lambda member: member[1].rpartition(".")[2])
    file, spans = io.BytesIO(), []
    form = tarfile.GNU_FORMAT if layout == "gnu" else tarfile.USTAR_FORMAT if layout == "pairs" else tarfile.PAX_FORMAT
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for number, name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.7e9 + number / 3 if layout == "float dates" else 1_700_000_000 + number  # type: ignore[assignment]
            start = file.tell()
            tar.addfile(info, io.BytesIO(data))
            end = file.tell() - (-len(data) % 512)
            spans.append((number, start, end - len(data), end))
    return file.getvalue(), spans


def _key(number: int, layout: str) -> str:
    if layout in ("long names", "gnu"):
        return f"{'a_long_folder_name/' * 6}{'x' * 40}{number:09d}"
    if layout == "unicode":
        return f"bild-ähnlich-{number:05d}-日本"
    return f"part{number % 3}/{number:06d}" if layout == "folders" else f"{number:09d}"


def _spans_at(original: Original, start: int, end: int) -> set[int]:
    """Samples whose data lies in these bytes."""
    return {number for number, _, data, stop in original.spans if data < end and start < stop}


def _records(original: Original, start: int, end: int) -> int:
    """Names in records that these bytes touch: they have no checksum, and a sample under two names is two that lack something."""
    return sum(first + 512 < end and start < data - 512 for _, first, data, _ in original.spans)


def _overwritten(original: Original, start: int, new: bytes) -> tuple[bytes, set[int]]:
    content = original.content[:start] + new + original.content[start + len(new) :]
    return content[: len(original.content)], _spans_at(original, start, start + len(new))


def _flip_header(original: Original, draw: random.Random) -> Mutation:
    content = bytearray(original.content)
    places = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        _, start, data, _ = draw.choice(original.spans)
        place = draw.choice([start, data - 512]) + draw.randrange(512)
        content[place] ^= 1 << draw.randrange(8)
        places.append(place)
    return Mutation(f"bytes {places}", bytes(content), slack=0)


def _flip_data(original: Original, draw: random.Random) -> Mutation:
    number, _, data, end = draw.choice(original.spans)
    content = bytearray(original.content)
    place = draw.randrange(data, end)
    content[place] ^= 1 << draw.randrange(8)
    return Mutation(f"byte {place}", bytes(content), changed={number})


def _flip_anywhere(original: Original, draw: random.Random) -> Mutation:
    content, places = bytearray(original.content), [draw.randrange(len(original.content)) for _ in range(draw.randint(1, 4))]
    changed: set[int] = set()
    for place in places:
        content[place] ^= 1 << draw.randrange(8)
        changed |= _spans_at(original, place, place + 1)
    records = sum(_records(original, place, place + 1) for place in places)
    return Mutation(f"bytes {places}", bytes(content), over=records, changed=changed)


def _overwritten_by(new: Callable[[random.Random, int], bytes], sizes: list[int], units: list[int]) -> Mutate:
    def mutate(original: Original, draw: random.Random) -> Mutation:
        size, unit = draw.choice(sizes), draw.choice(units)
        start = draw.randrange(max(1, original.spans[-1][3] - size)) // unit * unit
        content, changed = _overwritten(original, start, new(draw, size))
        return Mutation(f"{size} at {start}", content, slack=2, over=_records(original, start, start + size), changed=changed)

    return mutate


def _truncated(original: Original, draw: random.Random) -> Mutation:
    unit = draw.choice([1, 512])
    end = draw.randrange(original.spans[-1][3] + 512) // unit * unit
    return Mutation(f"to {end} bytes", original.content[:end], slack=END)


def _boundary(original: Original, draw: random.Random) -> Mutation:
    start = draw.choice(original.spans)[1]
    return Mutation(f"to {start} bytes", original.content[:start], slack=END)


def _ended_early(original: Original, draw: random.Random) -> Mutation:
    """Zeros from a member on to the end: what a copy over a broken line leaves."""
    start = draw.choice(original.spans[: len(original.spans) // 2])[1]
    return Mutation(f"from {start}", original.content[:start] + bytes(len(original.content) - start), slack=END)


def _appended(original: Original, draw: random.Random) -> Mutation:
    samples = draw.randint(1, 9)
    shift = random.Random(draw.random())
    more = _written(shift, samples, draw.choice(LAYOUTS))[0]
    return Mutation(f"{samples} more samples", original.content + more, added=samples)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _rewritten(kind: bytes, original: Original, draw: random.Random) -> Mutation:
    """Another sample whose members are links to those of one that is there, or to nothing."""
    file = io.BytesIO(original.content)
    number = draw.randrange(original.samples)
    nowhere = draw.random() < 0.3
    with tarfile.open(fileobj=file, mode="a") as tar:
        names = [member.name for member in tar.getmembers() if f"{number:05d}." in member.name or f"{number:05d}-" in member.name]
        for name in names:
            info = tarfile.TarInfo(name.replace(_key(number, original.layout), f"{_key(number, original.layout)}-again"))
            target = name if kind == tarfile.LNKTYPE else name.rpartition("/")[2]
            info.type, info.linkname = kind, "nowhere.png" if nowhere else target
            tar.addfile(info)
    return Mutation(f"to {'nothing' if nowhere else number}", file.getvalue(), added=1)


def _dotted(original: Original, draw: random.Random) -> Mutation:
    count = draw.randint(1, 5)
    file = io.BytesIO(original.content)
    base = draw.choice(["photo", _key(0, original.layout)])
    with tarfile.open(fileobj=file, mode="a") as tar:
        for number in range(count):
            for name, data in ((f"{base}.{number}.png", _png(9, draw)), (f"{base}.{number}.txt", b"a picture with the number 9")):
                _add(tar, name, data)
    return Mutation(f"{count} of {base[:20]}", file.getvalue(), added=count)


def _sparse(original: Original, draw: random.Random) -> Mutation:
    """A caption with a hole in it, as `tar --sparse` writes one: old GNU form, one piece of data at the end of the map."""
    text = b"a picture with the number %d" % 500
    image = _png(500, draw)
    file = io.BytesIO(original.content)
    with tarfile.open(fileobj=file, mode="a") as tar:
        _add(tar, "sparse.png", image)
        info = tarfile.TarInfo("sparse.txt")
        info.size = len(text)
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        block[156:157] = b"S"
        half = len(text) // 2
        block[386 : 386 + 48] = b"%011o\0%011o\0%011o\0%011o\0" % (0, half, half, len(text) - half)
        block[482] = 0
        block[483:495] = b"%011o\0" % len(text)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        tar.fileobj.write(bytes(block) + text.ljust(512, b"\0"))  # type: ignore[union-attr]
        tar.offset += 1024
    return Mutation("one member", file.getvalue(), added=1)


def _repeated(original: Original, draw: random.Random) -> Mutation:
    """The same keys once more, with other numbers, behind the first ones."""
    return Mutation("twice", original.content + original.content, added=original.samples)


_KINDS: dict[str, Mutate] = {
    "flipped bits in headers": _flip_header,
    "flipped bit in data": _flip_data,
    "flipped bits anywhere": _flip_anywhere,
    "zeros": _overwritten_by(lambda draw, size: bytes(size), [512, 512, 1024, 4096, 4096, 8192], [1, 512, 4096]),
    "garbage": _overwritten_by(lambda draw, size: draw.randbytes(size), [16, 100, 512, 4096, 5000], [1]),
    "truncated": _truncated,
    "cut at a header": _boundary,
    "zeros to the end": _ended_early,
    "another tar appended": _appended,
    "hard links": functools.partial(_rewritten, tarfile.LNKTYPE),
    "symbolic links": functools.partial(_rewritten, tarfile.SYMTYPE),
    "keys with dots": _dotted,
    "a sparse member": _sparse,
    "the same again": _repeated,
}
