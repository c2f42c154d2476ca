"""Folders of studies as `megakd study` leaves them, written in milliseconds, and what a report's page holds, read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VQA, RETRIEVAL = "vqa/test/accuracy", "retrieval/test/mean_R@1"
FAMILIES = ("colour", "count")
SCORES = [
    {"name": "vqa", "path": VQA, "title": "VQA", "main": True, "families": "vqa/test/by_family/*/accuracy"},
    {"name": "r1", "path": RETRIEVAL, "title": "retrieval", "main": False, "families": None},
]
PLAIN = "none"


def write_run(folder: Path, vqa: float | None, retrieval: float | None, *, seed: int = 0, more: Mapping[str, Any] | None = None) -> None:
    """A finished run: run.json, metrics.jsonl with an evaluation halfway, model/ and evaluation.json."""
    (folder / "model").mkdir(parents=True)
    recipe: dict[str, Any] = {
        "seed": seed,
        "optim": {"steps": 20},
        "data": {"train": "pairs/*.tar"},
        "student": {"model": "ViT-S-32"},
        "objectives": {"contrastive": 1.0},
        **(more or {}),
    }
    argv = ["/somewhere/megakd/train.py", "--local_rank=0", "--recipe", "r.json", "--out", "runs/a b"]
    about = {"argv": argv, "commit": "abc123", "versions": {"megakd": "0.2.0"}, "device": "cpu"}
    write_json(folder / "run.json", {"recipe": recipe, **about})
    half, end = (evaluation(vqa and vqa * share, retrieval and retrieval * share, step) for share, step in ((0.5, 10), (1.0, 20)))
    seconds = {"data": 1.0, "student": 3.0}
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 9.0 - step / 10, "losses": {"contrastive": 6.0 - step / 10}, "images_per_second": 100.0, "seconds": seconds}
        for step in (5, 10, 15)
    ]
    rows += [{"step": found["step"], "event": "evaluation", "content": found} for found in (half, end)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(folder / "evaluation.json", end)


def evaluation(vqa: float | None, retrieval: float | None, step: int = 20) -> dict[str, Any]:
    """evaluation.json, with the keys that real ones have."""
    found: dict[str, Any] = {"step": step, "sets": "5e75", "parameters": 1234567, "images_per_second": 789.0}
    if vqa is not None:
        families = {name: {"accuracy": vqa + 0.1 * place, "questions": 50} for place, name in enumerate(FAMILIES)}
        found["vqa"] = {"test": {"format": "vqav2", "metric": "VQA accuracy", "accuracy": vqa, "questions": 100, "by_family": families}}
    if retrieval is not None:
        both = {"R@1": retrieval, "R@5": min(1.0, retrieval + 0.3)}
        counts = {"pairs": 100, "images": 100, "unreadable": 0, "repeated_captions": 0}
        found["retrieval"] = {"test": {"image_to_text": both, "text_to_image": both, "mean_R@1": retrieval, **counts}}
    return found


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_study(
    folder: Path,
    score: Callable[[str | None, str, int], float],
    *,
    teachers: Sequence[str] = ("T1", "T2", "T3"),
    methods: Sequence[str] = ("similarity", "patch"),
    seeds: int = 3,
    status: Callable[[str | None, str, int], tuple[str, str]] = lambda *_: ("done", ""),
    more: Mapping[str, Any] | None = None,
) -> Path:
    """A study's folder. score: of a teacher (None: of none), method and seed, the VQA; retrieval is half of it. status: and last words.

    A status "absent" leaves the cell out of the grid. Teacher number n has 0.5 + n / 10 itself. more: keys of study.json that differ.
    """
    folder.mkdir(parents=True)
    cells = []
    for seed in range(seeds):
        for number, (teacher, method) in enumerate([(None, PLAIN), *((teacher, method) for teacher in teachers for method in methods)]):
            state, message = status(teacher, method, seed)
            if state == "absent":
                continue
            name = f"cells/{number}_{seed}"
            if state == "done":
                value = score(teacher, method, seed)
                write_run(folder / name, value, value / 2, seed=seed)
            axes = {"teacher": teacher, "student": "small", "method": method, "steps": "20", "data": "clean", "seed": seed}
            cells.append({"id": f"cell{number}-{seed}", "folder": name, "axes": axes, "status": state, "message": message, "recipe": "r"})
    for number, _ in enumerate(teachers):
        write_run(folder / f"teachers/{number}", 0.5 + number / 10, 0.3 + number / 10)
    own = [
        {"name": name, "folder": f"teachers/{number}", "status": "done", "message": "", "parameters": 5}
        for number, name in enumerate(teachers)
    ]
    axes_of_all = {"teacher": list(teachers), "student": ["small"], "method": [PLAIN, *methods], "steps": ["20"], "data": ["clean"]}
    content = {
        "format": 1, "title": "A study", "question": "Do they?", "file": "S.toml", "command": "megakd study S.toml", "commit": "c0ffee",
        "version": "0.2.0", "data": {"pairs": "da7a"}, "axes": {**axes_of_all, "seed": list(range(seeds))}, "scores": SCORES,
        "plain_method": PLAIN, "cells": cells, "teachers": own, "controls": [], "hypotheses": [],
    }  # fmt: skip
    write_json(folder / "study.json", {**content, **(more or {})})
    return folder


@dataclass
class PageCell:
    text: str = ""
    value: str | None = None


@dataclass
class Page(HTMLParser):
    """What a page says. tables: cells by the table's key, the head first; figures: their ids; shown: its text, without styles."""

    tables: dict[str, list[list[PageCell]]] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    shown: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._cell: PageCell | None = None
        self._rows: list[list[PageCell]] = []
        self._quiet = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(str(found["data-table"]), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = PageCell(value=found.get("data-value"))
            self._rows[-1].append(self._cell)
        elif tag == "figure":
            self.figures.append(str(found["id"]))
        elif tag in ("style", "script") or (tag == "span" and found.get("class") == "sr"):
            self._quiet += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = None
        elif self._quiet and tag in ("style", "script", "span"):
            self._quiet -= 1

    def handle_data(self, data: str) -> None:
        if not self._quiet:
            self.shown += data
            if self._cell is not None:
                self._cell.text += data

    @classmethod
    def read(cls, path: Path) -> Page:
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        return page
