"""The page of faults, FIELD.md: every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LINES = (TESTS / "FIELD.md").read_text(encoding="utf-8").splitlines()
ROWS = [line for line in LINES if line.startswith("| ") and "Public report" not in line]


def _named(row: str) -> list[tuple[str, str | None]]:
    """Files of tests that a row names, each with a function of it or None; `::name` alone belongs to the file before it."""
    found: list[tuple[str, str | None]] = []
    for file, function in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", row):
        if file or function:
            assert file or found, f"no file before ::{function} in {row}"
            found.append((file or found[-1][0], function or None))
    return found


def test_the_page_has_a_row_for_each_of_more_than_fifty_kinds_and_a_test_in_each() -> None:
    assert len(ROWS) > 50
    assert [row for row in ROWS if not _named(row)] == []
    assert len({row.split("|")[1] for row in ROWS}) == len(ROWS)


def test_every_report_is_a_number_of_a_repository_or_was_found_in_review() -> None:
    report = re.compile(r"[\w.-]+/[\w.-]+#\d+( \([^)]*\))?(, [\w.-]+/[\w.-]+#\d+( \([^)]*\))?)*|found in review")
    assert [row for row in ROWS if not report.fullmatch(row.split(" | ")[1])] == []


def test_every_test_that_the_page_names_is_there() -> None:
    missing = []
    for file, function in {name for row in ROWS for name in _named(row)}:
        path = TESTS.parent / file
        if not path.is_file() or (function and not re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE)):
            missing.append(f"{file}::{function}")
    assert sorted(missing) == []
