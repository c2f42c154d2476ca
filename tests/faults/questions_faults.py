"""Question files that were damaged, converted badly or put together by hand: refused by file and entry, or read as what they say.

The truth is what the mutator knows: entries that it did not touch are read as from the unharmed file, with their own image, and as many
questions come out as there are entries, less what is said.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults import damage
from faults.campaign import Mutant, SilentFault
from megakd.data.bad_samples import BadSample
from megakd.recipe import Decoder, QuestionSource
from megakd.vqa import check
from megakd.vqa.benchmarks.base import Question
from megakd.vqa.prompts import PromptEncoder
from megakd.vqa.sets import QuestionSet, QuestionWithImage
from support import questions as files
from support.tokenizers import qwen2

NAME, COUNT, LIMIT, FEW = "questions", 1200, 20.0, 24
VALUES = (
    *damage.VALUES,
    *("\n", "x" * 300, "y" * 10**6, "../../etc/passwd", "/etc/passwd", "\ud800", "<image>", "{", "{question}", "<|im_end|>"),
    *([[]], {"answer": "x"}, ["a", "b"]),
)
_PATTERNS = ["{", "}", "cat.jpg", "{image_id:9999999999d}", "{image_id.__class__}", "{nothing}", "{0}", "{}", "{image_id!r}", "{image[0]}"]
_PATTERNS += ["x" * 5000 + "{question_id}", "{question}.jpg", "a/" * 3000 + "{question_id}", "{question_id}\0"]
_listed = {"vqav2": "questions", "textvqa": "data", "seed": "questions"}


def mutants(count: int, draw: random.Random, folder: Path) -> Iterator[Mutant]:
    originals = {kind: write(folder / kind) for kind, write in files.WRITERS.items()}
    right = {kind: _read(source)[0] for kind, source in originals.items()}
    for number in range(count):
        kind = list(originals)[number % len(originals)]
        copied = folder / "mutant"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(folder / kind, copied)
        given = {name: value for name, value in originals[kind].model_dump().items() if value is not None}
        given |= {name: value.replace(str(folder / kind), str(copied)) for name, value in given.items() if isinstance(value, str)}
        source = QuestionSource.model_validate(given)
        name, source, expected, touched = draw.choice([_text, _value, _value, _value, _settings])(source, draw)
        yield Mutant(f"{kind}: {name}", functools.partial(_attempt, source, right[kind], expected, touched))


def _read(source: QuestionSource) -> tuple[list[tuple[Question, bytes | None]], list[str]]:
    said: list[str] = []
    told, log = logging.Handler(), logging.getLogger("megakd.vqa")
    told.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(told)
    try:
        opened = files.opened(source, to_learn=True)
    finally:
        log.removeHandler(told)
    assert isinstance(opened, QuestionSet)
    talk = PromptEncoder(qwen2(), Decoder(model="any"), 4, 2048)
    tried = check.try_training(opened, talk, True, "answers.train.mine", 0.5)
    check.try_prompts(opened, talk, True, "evaluation.vqa.mine", 0.5)
    lines = said + tried.sentences("answers.train.mine", learned=True)
    found = []
    for one in opened.read(range(len(opened)), True):
        if isinstance(one, BadSample):
            lines.append(str(one))
        else:
            assert isinstance(one, QuestionWithImage)
            found.append((one.question, one.image))
    return found, lines


def _attempt(source: QuestionSource, right: list[tuple[Question, bytes | None]], expected: int | None, touched: set[str]) -> str:
    """touched: ids of the entries that were changed; "*" where it may be any one."""
    found, told = _read(source)
    if expected is not None and len(found) < expected and not told:
        raise SilentFault(f"{len(found)} questions of {expected}")
    if expected is not None and len(found) > expected:
        raise SilentFault(f"{len(found)} questions of {expected} entries")
    known = {(str(one.question_id), one.text): (one, image) for one, image in right}
    strange = 0
    for one, image in found:
        if not one.answer.strip() or (source.format != "llava" and not one.text.strip()):
            raise SilentFault(f"question {one.question_id!r} asks or answers nothing: {one.text!r}, {one.answer!r}")
        if one.image is not None and image is None:
            raise SilentFault(f"question {one.question_id!r} has lost its image {one.image!r}")
        if str(one.question_id) in touched:
            continue
        before = known.get((str(one.question_id), one.text))
        if before is None or (before[0].answer, before[0].conversation, before[1]) != (one.answer, one.conversation, image):
            strange += 1
    if strange > ("*" in touched):
        raise SilentFault(f"{strange} questions are not what was written")
    return "told" if told else "sound"


Made = tuple[str, QuestionSource, int | None, set[str]]


def _target(source: QuestionSource, draw: random.Random) -> Path:
    assert source.questions is not None
    paths = [Path(source.questions)] * 3 + ([Path(source.annotations)] if source.annotations else [])
    return draw.choice(paths + ([Path(source.questions).with_name("pid_splits.json")] if source.format == "scienceqa" else []))


def _text(source: QuestionSource, draw: random.Random) -> Made:
    path = _target(source, draw)
    name, content = damage.json_text(path.read_text(encoding="utf-8"), draw)
    path.write_bytes(content)
    harmless = name in damage.HARMLESS
    return f"{path.name}: {name}", source, _count(source) if harmless else None, set() if harmless else {"*"}


def _load(path: Path, lines: bool) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    return [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)


def _store(path: Path, value: Any, lines: bool) -> None:
    path.write_text("\n".join(map(json.dumps, value)) if lines else json.dumps(value), encoding="utf-8")


def _count(source: QuestionSource) -> int:
    assert source.questions is not None
    path = Path(source.questions)
    if source.format == "scienceqa":
        return len(_load(path.with_name("pid_splits.json"), False)["test"])
    value = _load(path, source.format == "pope")
    return len(value[_listed[source.format]] if source.format in _listed else value)


def _value(source: QuestionSource, draw: random.Random) -> Made:
    """One value anywhere in one of the files: another one, gone, under another name, or an entry twice, or two entries' values swapped."""
    path = _target(source, draw)
    lines = source.format == "pope" and path.suffix == ".json"
    value = _load(path, lines)
    inner, key, where = damage.json_place(value, draw)
    new, action = copy.deepcopy(draw.choice(VALUES)), draw.choice(["set", "set", "set", "delete", "rename", "twice", "swap", "nest"])
    if action == "nest":
        for _ in range(200):
            new = [new]
        inner[key] = new
    elif action == "set":
        inner[key] = new
    elif action == "delete":
        del inner[key]
    elif action == "rename" and isinstance(inner, dict):
        inner[f"{key}x"] = inner.pop(key)
    elif action == "twice" and isinstance(inner, list):
        inner.append(copy.deepcopy(inner[key]))
    elif isinstance(inner, list) and len(inner) > 1:
        inner[key], inner[key - 1] = inner[key - 1], inner[key]
    else:
        inner[key] = new
    try:
        _store(path, value, lines)
        expected = _count(source)
    except (KeyError, TypeError, ValueError):
        expected = None
    return f"{path.name}: {action} {where} {str(new)[:30]!r}", source, expected, _ids(source, where, value)


def _ids(source: QuestionSource, where: list[Any], value: Any) -> set[str]:
    """Of the entries that the change may have touched: by its place, also where that is in a list of answers."""
    found = {str(part) for part in where}
    for part in (value, *(value.values() if isinstance(value, dict) else [])):
        if isinstance(part, list):
            for number in [one for one in where if isinstance(one, int)]:
                for near in (number, number - 1):
                    if -len(part) <= near < len(part) and isinstance(part[near], dict):
                        found |= {str(part[near].get(key)) for key in ("question_id", "id", "image")} | {str(near + 1), str(near)}
    return found | {"*"}


def _settings(source: QuestionSource, draw: random.Random) -> Made:
    """Values of the recipe that fit the type and not the files."""
    kind = draw.choice(["image_name", "image_name", "image_name", "images", "questions", "format", "split", "annotations"])
    paths = ["", "/", ".", "nowhere", "x" * 300, "a/" * 3000, "\0", "/dev/zero", "/proc/self/mem", "*.tar", "{0..99999999999}.tar"]
    values: dict[str, Callable[[], str]] = {
        "image_name": lambda: draw.choice(_PATTERNS),
        "format": lambda: draw.choice([one for one in files.WRITERS if one != source.format]),
        "split": lambda: draw.choice(["train", "val", "test2", "", "x" * 1000]),
    }
    new = values.get(kind, lambda: draw.choice(paths))()
    return f"{kind} = {new[:60]!r}", source.model_copy(update={kind: new}), None, {"*"}
