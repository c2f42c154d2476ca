"""The whole smoke job, as `make smoke` runs it: minutes, so behind `make test-slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_smoke_table_shows_the_student_with_kd_ahead(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("megakd")), "smoke", "--out", str(tmp_path / "runs"), "--data", str(tmp_path / "data")]
    subprocess.run(command, check=True, cwd=tmp_path)
    teacher, with_kd, without = json.loads((tmp_path / "runs" / "table.json").read_text())["rows"]
    assert teacher["runs"][0]["zero_shot"] > 0.5
    for measure in ("zero_shot", "mean_R@1"):
        assert with_kd["runs"][0][measure] > without["runs"][0][measure] + 0.1, measure
    again = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "there already" in again
    assert "resuming from" in again


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_vqa_table_orders_the_vision_towers(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("megakd")), "smoke", "--vqa"]
    subprocess.run([*command, "--out", str(tmp_path / "runs"), "--data", str(tmp_path / "data")], check=True, cwd=tmp_path)
    rows = json.loads((tmp_path / "runs" / "table.json").read_text())["rows"]
    overall = {name: runs[0]["test"]["accuracy"] for name, runs in rows.items()}
    assert overall["random tower"] > overall["blind"] + 0.01
    for trained in ("student, KD", "teacher's tower"):
        assert overall[trained] > overall["random tower"] + 0.02, trained
