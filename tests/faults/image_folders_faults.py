"""Folders of images with the files that say what belongs to them, damaged one by one: Karpathy's, COCO's, SugarCrepe's, ARO's, classes.

The model reads every picture and every sentence, so a sound set scores 100 %. Of k pictures that cannot be read exactly k are wrong and
counted; a changed value is refused or costs no other entry than its own and the one whose place it takes.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from faults import damage
from faults.campaign import Mutant, SilentFault
from faults.evaluation_sets_faults import LOST, PICTURES, SAMPLES
from support.numbered_pictures import picture, recipe, results

NAME, COUNT, LIMIT, FEW = "image_folders", 300, 20.0, 24
_LONG = "9" * 5000  # which is no number to the model of these sets
VALUES = (
    *(value for value in damage.VALUES if value != _LONG),
    *("../0.png", "/etc/passwd", "0.png", "\n", "99 a", {"raw": "99 a"}, ["99 a", "98 b"], 10**6, -(10**6)),
)
KINDS = ("karpathy", "coco", "sugarcrepe", "aro", "order", "classes")


def _files(kind: str) -> Any:
    """The content of the file of annotations; None for class folders."""
    numbers = range(SAMPLES)
    box = {"bbox_x": 0, "bbox_y": 0, "bbox_w": 16, "bbox_h": 16}
    captions = [{"image_id": number, "id": number, "caption": f"{number} a"} for number in numbers]
    return {
        "karpathy": {
            "images": [
                {"filename": f"{number}.png", "split": "test", "sentences": [{"raw": f"{number} a"}, {"raw": f"{number} b"}]}
                for number in numbers
            ]
        },
        "coco": {"images": [{"id": number, "file_name": f"{number}.png"} for number in numbers], "annotations": captions},
        "sugarcrepe": {
            str(number): {"filename": f"{number}.png", "caption": f"{number} a", "negative_caption": "99 a"} for number in numbers
        },
        "aro": [
            {"image_path": f"{number}.png", "true_caption": f"{number} a", "false_caption": "99 a", "relation_name": "on", **box}
            for number in numbers
        ],
        "order": [{"image": f"{number}.png", "caption_options": [f"{number} a", "99 a", "98 b"]} for number in numbers],
        "classes": None,
    }[kind]


def _entries(content: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    found: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        inner = waiting.pop()
        pairs = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, value in pairs:
            found.append((inner, key))
            waiting.append(value)
    return found


def _write(folder: Path, kind: str) -> dict[str, Any] | str:
    """A sound set; how a recipe names it."""
    for number in range(SAMPLES):
        path = folder / (f"class {number:02d}/{number}.png" if kind == "classes" else f"images/{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    if kind == "classes":
        (folder / "classnames.txt").write_text("\n".join(map(str, range(SAMPLES))))
        (folder / "zeroshot_classification_templates.txt").write_text("{c} it is\n")
        return str(folder)
    (folder / "mine.json").write_text(json.dumps(_files(kind)), encoding="utf-8")
    return {"annotations": str(folder / "mine.json"), "images": str(folder / "images")}


def _scored(kind: str, where: dict[str, Any] | str) -> tuple[int, int, int]:
    """Samples that were scored, that are right, and that could not be read."""
    section = {"classes": "zero_shot", "karpathy": "retrieval", "coco": "retrieval"}.get(kind, "hard_negatives")
    found = results(recipe(1.0, **{section: {"mine": where}}))[section]["mine"]
    if section == "zero_shot":
        return found["images"], round(found["top1"] * found["images"]), found["unreadable"]
    if section == "retrieval":
        return found["images"], round(found["image_to_text"]["R@1"] * found["images"]), found["unreadable"]
    by_kind = [scores for name, scores in found.items() if name != "mean of kinds"]
    right = sum(round(scores["accuracy"] * scores["pairs"]) for scores in by_kind)
    return sum(scores["pairs"] for scores in by_kind), right, sum(scores["unreadable"] for scores in by_kind)


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        where = _write(folder / str(number), kind)
        file = folder / str(number) / "mine.json"
        way = draw.choice(("picture", "value", "value", "bytes")) if kind != "classes" else draw.choice(("picture", "folder"))
        if way == "picture":
            name, change, outcome = draw.choice([one for one in PICTURES if one[1](0, b"x") is not None])
            rows = draw.sample(range(SAMPLES), draw.choice((1, 2, 3)))
            for row in rows:
                path = next((folder / str(number)).rglob(f"{row}.png"))
                path.write_bytes(change(row, path.read_bytes()) or b"")
            said, attempt = f"{name} in {sorted(rows)}", partial(_exactly, kind, where, len(rows) if outcome == LOST else 0)
        elif way == "folder":
            said, attempt = _changed_folder(folder / str(number), draw), partial(_any, kind, where)
        elif way == "bytes":
            said, attempt = damage.bytes_of(file, draw), partial(_any, kind, where)
        else:
            content = _files(kind)
            inner, key = draw.choice(_entries(content))
            value = draw.choice(VALUES)
            if draw.random() < 0.2:
                said = f"without {key!r}"
                del inner[key]
            else:
                said = f"{key!r} = {str(value)[:40]!r}"
                inner[key] = value
            file.write_text(_dumped(content), encoding="utf-8")
            attempt = partial(_others_are_right, kind, where) if key not in ("images", "annotations") else partial(_any, kind, where)
        yield Mutant(f"{kind}: {said}", attempt)


def _dumped(content: Any) -> str:
    return json.dumps(content, ensure_ascii=True)


def _changed_folder(folder: Path, draw: random.Random) -> str:
    """Change something about the class folders, and say what."""
    loose = io.BytesIO()
    Image.new("RGB", (9, 9)).save(loose, "PNG")
    changes: dict[str, Callable[[], object]] = {
        "an image beside the class folders": lambda: (folder / "x.png").write_bytes(loose.getvalue()),
        "a file of another kind": lambda: (folder / "class 03/notes.txt").write_text("x"),
        "a link that leads nowhere": lambda: (folder / "class 03/y.png").symlink_to(folder / "nowhere"),
        "a link to its own folder": lambda: (folder / "class 03/again").symlink_to(folder / "class 03", target_is_directory=True),
        "a folder named like an image": lambda: (folder / "class 03/z.png").mkdir(),
        "one more class folder": lambda: (folder / "class 99").mkdir(),
        "a class folder gone": lambda: (folder / "class 03").rename(folder.parent / f"{folder.name} gone"),
        "no class names": lambda: (folder / "classnames.txt").unlink(),
        "class names that are a folder": lambda: ((folder / "classnames.txt").unlink(), (folder / "classnames.txt").mkdir()),
        "a name that is no text": lambda: (folder / "class 03/3.png").rename(folder / "class 03/\udcff.png"),
    }
    name = draw.choice(list(changes))
    changes[name]()
    return name


def _any(kind: str, where: dict[str, Any] | str) -> str:
    """Refused, or scored: what a changed byte says may be another truth."""
    scored, _, unread = _scored(kind, where)
    return "told" if unread or scored != SAMPLES else "sound"


def _exactly(kind: str, where: dict[str, Any] | str, lost: int) -> str:
    try:
        found = _scored(kind, where)
    except ValueError:
        raise SilentFault("refused, though it can be scored") from None
    if found != (SAMPLES, SAMPLES - lost, lost):
        raise SilentFault(f"{lost} of {SAMPLES} pictures cannot be read, and it says {found}")
    return "told" if lost else "sound"


def _others_are_right(kind: str, where: dict[str, Any] | str) -> str:
    """One entry was changed: itself, and one that has its picture or its number now, may be wrong."""
    scored, right, _ = _scored(kind, where)
    if right < SAMPLES - 2 or scored < SAMPLES - 2:
        raise SilentFault(f"one entry of {SAMPLES} was changed, and {right} of {scored} are right")
    return "told" if right < SAMPLES else "sound"
