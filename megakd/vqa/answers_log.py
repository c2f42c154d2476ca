"""The answers of one set on disk, while they come in and afterwards.

SET.jsonl        the answers so far, behind a header; written whole, by rank 0
SET.rank3.jsonl  what rank 3 adds, a line each behind a header; joined into SET.jsonl at the next start, and at the end

The question of a half-written or damaged line is asked again, and so are all of a file with another evaluation's header.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megakd.recipe.credentials import redacted
from megakd.runtime.files import write_text

log = logging.getLogger("megakd.vqa")


class GivenAnswer(NamedTuple):
    """unusable: why the question could not be asked; `answer` is "" then."""

    answer: str
    unusable: str | None = None


@dataclass(frozen=True)
class AnswersLog:
    """Answers of the set `name`, without a dot, in `folder`. fingerprint: what they depend on. question_ids: of the set, in order."""

    folder: Path
    name: str
    fingerprint: Mapping[str, Any]
    question_ids: Sequence[str | int]

    @property
    def path(self) -> Path:
        return self.path_of(self.folder, self.name)

    @staticmethod
    def path_of(folder: Path, name: str) -> Path:
        return folder / f"{name}.jsonl"

    def open(self) -> dict[int, GivenAnswer]:
        """Answers of an earlier start by index, joined into one file. For rank 0, while the others wait."""
        rows: dict[int, GivenAnswer] = {}
        for path in self._files():
            rows |= self._read(path)
        self.close(rows)
        return rows

    @contextmanager
    def appending(self, rank: int) -> Iterator[Callable[[Mapping[int, GivenAnswer]], None]]:
        """Inside the block, the function given writes rows so that a killed process loses none of them."""
        path = self.folder / f"{self.name}.rank{rank}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:

            def append(rows: Mapping[int, GivenAnswer]) -> None:
                file.writelines(f"{self._line(index, row)}\n" for index, row in rows.items())
                file.flush()

            file.write(self._header() + "\n")
            yield append

    def close(self, rows: Mapping[int, GivenAnswer]) -> None:
        """All rows in one file, in the set's order; no other file is left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = (self._header(), *(self._line(index, rows[index]) for index in sorted(rows)))
        write_text(self.path, "".join(f"{line}\n" for line in lines))  # first what holds all rows, then what held some of them
        for path in self._files():
            if path != self.path:
                path.unlink()

    def _files(self) -> list[Path]:
        return [path for path in (self.path, *sorted(self.folder.glob(f"{self.name}.rank*.jsonl"))) if path.exists()]

    def _header(self) -> str:
        return json.dumps(redacted({"answers_of": self.name, "key": self._key(), **self.fingerprint}))

    def _key(self) -> str:
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()

    def _line(self, index: int, row: GivenAnswer) -> str:
        why = {} if row.unusable is None else {"unusable": row.unusable}
        return json.dumps({"index": index, "question_id": self.question_ids[index], "answer": row.answer, **why})

    def _read(self, path: Path) -> dict[int, GivenAnswer]:
        header, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if (_object(header) or {}).get("key") != self._key():
            log.warning("%s: answers of another model, set or setting: all questions are asked again", path)
            return {}
        rows: dict[int, GivenAnswer] = {}
        damaged = 0
        for line in lines:
            if (row := self._row(line)) is None:
                damaged += 1
            else:
                rows[row[0]] = row[1]
        if damaged:
            log.warning("%s: %d lines are damaged: their questions are asked again", path, damaged)
        return rows

    def _row(self, line: str) -> tuple[int, GivenAnswer] | None:
        row = _object(line)
        if row is None or type(index := row.get("index")) is not int or not 0 <= index < len(self.question_ids):
            return None
        answer, why = row.get("answer"), row.get("unusable")
        if row.get("question_id") != self.question_ids[index] or not isinstance(answer, str) or not (why is None or isinstance(why, str)):
            return None
        return index, GivenAnswer(answer, why)


def read_written(path: Path) -> list[tuple[int, str | int, GivenAnswer]] | None:
    """(index, question_id, answer) of each whole line of SET.jsonl, whichever model gave it; None where there is no such file.

    For those who only look at answers.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    found = []
    for line in lines[1:]:
        row = _object(line) or {}
        index, question_id, answer, why = (row.get(key) for key in ("index", "question_id", "answer", "unusable"))
        if type(index) is int and isinstance(question_id, str | int) and isinstance(answer, str) and (why is None or isinstance(why, str)):
            found.append((index, question_id, GivenAnswer(answer, why)))
    return found


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
