"""The shipped study at its small size, as a user runs it from a fresh clone: up to ten minutes, so behind `make test-slow`."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import environment
from support.study_folders import Page


@pytest.mark.slow
@pytest.mark.timeout(2400)  # other tests share the cores
def test_study_shapes_small_and_its_report_end_with_a_page(tmp_path: Path) -> None:
    megakd = [sys.executable, "-m", "megakd.cli"]
    subprocess.run([*megakd, "study", "study_shapes", "--small"], cwd=tmp_path, env=environment(), check=True)
    folder = tmp_path / "runs" / "study_shapes"
    subprocess.run([*megakd, "report", str(folder)], cwd=tmp_path, env=environment(), check=True)
    assert (folder / "report.html").stat().st_size < 3e6
    page = Page.read(folder / "report.html")
    assert {"methods", "references", "hypotheses", "rows"} <= page.tables.keys()
    assert page.figures
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["status"] for row in rows} == {"done"}
    cells = {(row["teacher"], row["method"]): float(row["zero_shot/seen/top1"]) for row in rows if row["kind"] == "cell"}
    teachers = {row["teacher"]: float(row["zero_shot/seen/top1"]) for row in rows if row["kind"] == "teacher"}
    assert teachers["strong"] > teachers["middle"] + 0.1 > teachers["weak"] + 0.2
    assert cells["strong", "similarity"] > cells["", "no KD"] + 0.2
