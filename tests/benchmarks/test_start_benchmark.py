"""What `megakd bench start` compares: a set before and after it has its file, and programs by the processor time of all they start."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.benchmarks import start
from megakd.data import set_index, tar_index


def test_a_resume_opens_no_index_and_the_start_before_it_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "SAMPLES", 3)
    opened: list[str] = []
    load = tar_index.load_checked
    monkeypatch.setattr(tar_index, "load_checked", lambda name, *more: (opened.append(name), load(name, *more))[1])
    count = set_index.SMALLEST + 2
    found = start.index_seconds(tmp_path / "set", count, 2)
    assert {kind: len(spent) for kind, spent in found.items()} == {"each": 2, "resume": 2}
    assert len(opened) == 2 * count + 1  # and the one from which the others are linked
    few = start.index_seconds(tmp_path / "few", 2, 1)
    assert len(opened) == 2 * count + 1 + 1 + 2 * 2
    assert len(few["resume"]) == 1


def test_processor_time_is_of_the_program_and_of_its_children(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text("import time\nwhile time.process_time() < 0.4: pass\n", encoding="utf-8")
    (tmp_path / "parent.py").write_text("import subprocess, sys; subprocess.run([sys.executable, 'busy.py'])\n", encoding="utf-8")
    assert start._program(["parent.py"], tmp_path).processor > 0.35
    (tmp_path / "wrong.py").write_text("import sys; sys.exit('no such thing')\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"wrong\.py ended with exit code 1(.|\n)*no such thing"):
        start._program(["wrong.py"], tmp_path)


def test_a_verdict_names_the_figure_and_the_target() -> None:
    assert start._verdict(4.995, 5.0) == "reached: 5.00 of 5"
    assert start._verdict(6.0, 5.0) == "missed: 6.00 of 5"
