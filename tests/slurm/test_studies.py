"""Studies on the real cluster: as arrays that wait for each other, and as one job of slurm/study.sh."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megakd.study import run as studies
from megakd.study.results import STUDY
from support.runs import megakd
from support.slurm_jobs import job, sbatch, until, wait
from support.slurm_scripts import scontrol
from support.tiny_studies import FILE, scores

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_jobs_left"), pytest.mark.timeout(900)]
ON_CPUS = ("--gpus_per_node", "0", "--cpus_per_task", "1", "--mem", "2G", "--time", "15")


@pytest.fixture
def study(site: Path, tmp_path: Path) -> Path:
    """The file of a tiny study whose world is beside it."""
    path = tmp_path / "tiny.toml"
    path.write_text(FILE.replace('folder = "world"', f'folder = "{tmp_path / "world"}"'))
    return path


def test_arrays_wait_for_each_other_and_are_sent_once(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ("study", study, "--out", out, "--small", "--cluster", "slurm", *ON_CPUS)
    assert megakd(*asked, "--dry_run") == 0
    assert not out.exists()
    assert "array 2: 1 runs, store" in capsys.readouterr().out
    assert megakd(*asked) == 0
    said = capsys.readouterr().out
    assert [line.split(" as ")[0] for line in said.splitlines() if line.startswith("array ")] == [
        "array 1: 2 runs", "array 2: 1 runs", "array 3: 1 runs",
    ]  # fmt: skip
    sent = json.loads((out / "slurm" / "arrays.json").read_text())["jobs"]
    assert "afterany" in job(sent[-1])["Dependency"]
    assert megakd(*asked) == 2
    assert "arrays of this study are in the queue" in capsys.readouterr().err
    for one in sent:
        assert wait(one)["JobState"] == "COMPLETED", (out / "logs").exists()
    _, _, work, _ = studies.load(str(study), out, small=True)
    assert all(one.done(out) for one in work.jobs.values())
    assert megakd(*asked) == 0
    assert "every run is done" in capsys.readouterr().out


def test_the_script_runs_a_grid_and_goes_on_after_it_was_requeued(study: Path, site: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    size = ("--gpus-per-node=1", "--cpus-per-task=1", "--mem=6G", "--time=10")
    id = sbatch(*size, "slurm/study.sh", study, "--small", "--out", out)
    log = site / f"study-{id}.log"
    until(lambda: list(out.glob("teachers/*/model")), tell=lambda: log.read_text() if log.exists() else "no log")
    scontrol("requeue", id)
    assert wait(id, restarts=1)["JobState"] == "COMPLETED", log.read_text()
    assert len(scores(out)) == 3
    assert json.loads((out / STUDY).read_text())["title"] == "tiny"
    assert os.fspath(out) in log.read_text()
    assert subprocess.run(["squeue", "-h", "-j", id], capture_output=True, text=True, check=False).stdout.strip() == ""
