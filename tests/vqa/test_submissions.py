"""What is sent to each benchmark's server, entry by entry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megakd.recipe.vqa import BENCHMARKS
from megakd.vqa.benchmarks import benchmark, parse
from megakd.vqa.benchmarks.base import Answered
from support import questions as files

ASK = "\nAnswer with the option's letter from the given choices directly."
NORTH = "Context: N/A\nQuestion: Which is north?\nOptions: (A) Maine (B) Ohio"
GAS = "Context: Look.\nQuestion: Which is a gas?\nOptions: (A) ice (B) steam (C) rain"
# The first answers " A Bus.\n" and "", which is also what a question that could not be asked leaves.
ENTRIES: dict[str, list[dict[str, Any]]] = {
    "vqav2": [{"question_id": 1000, "answer": "A Bus."}, {"question_id": 1001, "answer": ""}],
    "textvqa": [{"question_id": 34602, "answer": "A Bus."}],
    "vizwiz": [{"image": "VizWiz_val_00000000.jpg", "answer": "A Bus."}, {"image": "VizWiz_val_00000001.jpg", "answer": ""}],
    "gqa": [{"questionId": "05515938", "prediction": "a bus"}, {"questionId": "05515939", "prediction": ""}],
    "scienceqa": [
        {"question_id": "1", "prompt": f"<image>\n{NORTH}{ASK}", "text": " A Bus.\n"},
        {"question_id": "2", "prompt": f"{GAS}{ASK}", "text": ""},
    ],
    "pope": [
        {"question_id": 1, "question": "Is there a snowboard in the image?", "answer": " A Bus.\n"},
        {"question_id": 2, "question": "Is there a backpack in the image?", "answer": ""},
    ],
    "seed": [{"question_id": "101669", "prediction": " A Bus.\n"}, {"question_id": "75500", "prediction": ""}],
}


def written(kind: str, folder: Path, make: Callable[..., Any]) -> Path | None:
    questions = list(parse(make(folder / "set"))[0])[:2]
    answered = [Answered(*pair) for pair in zip(questions, (" A Bus.\n", ""), strict=False)]
    return benchmark(kind).write_submission(answered, folder, "test")


@pytest.mark.parametrize("kind", ENTRIES)
def test_every_benchmark_gets_the_entries_it_reads(tmp_path: Path, kind: str) -> None:
    path = written(kind, tmp_path, files.WRITERS[kind])
    assert path is not None
    lines = kind in ("pope", "scienceqa", "seed")
    assert path.name == ("test.submission.jsonl" if lines else "test.submission.json")
    text = path.read_text()
    assert ([json.loads(line) for line in text.splitlines()] if lines else json.loads(text)) == ENTRIES[kind]
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == [path.name]


def test_conversations_have_no_server_and_every_other_format_one(tmp_path: Path) -> None:
    assert written("llava", tmp_path, files.llava) is None
    assert set(ENTRIES) == set(BENCHMARKS) - {"llava"}
