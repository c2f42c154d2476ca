"""What a study needs beyond megakd's own libraries, in an environment that lacks it: one message with the way to install it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support.runs import REPOSITORY
from support.study_folders import write_study

CALLS = {
    "scipy": "from megakd.study.statistics import paired_gain; paired_gain({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.3})",
    "sklearn": "from pathlib import Path; from megakd.data.digits import write_digits; write_digits(Path('digits'), train=2, test=2)",
    "matplotlib": "from megakd.pages.drawing import matplotlib; matplotlib()",
    "jinja2": "from pathlib import Path; from megakd.study import found_runs; from megakd.study.report import page; "
    "page.make(found_runs.read([Path('run')]), Path('out'), [])",
}
SAID = {
    "scipy": "the statistics of a study need scipy, which is not there (No module named 'scipy'); `pip install scipy`",
    "sklearn": "handwritten digits need scikit-learn, which is not there (No module named 'sklearn'); `pip install scikit-learn`",
    "matplotlib": "a report's figures need matplotlib, which is not there (No module named 'matplotlib'); `pip install matplotlib`",
    "jinja2": "a report's page needs jinja2, which is not there (No module named 'jinja2'); `pip install jinja2`",
}


def called(code: str, folder: Path, *missing: str) -> subprocess.CompletedProcess[str]:
    """The code in `folder`, with this environment's packages but those that are missing, as links in another folder."""
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name not in missing and not entry.name.endswith(".pth"):
            (packages / entry.name).symlink_to(entry)
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels", packages)))
    return subprocess.run(
        [sys.executable, "-S", "-c", code], env={**os.environ, "PYTHONPATH": path}, cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("package", CALLS)
def test_one_message_names_what_is_missing_and_the_extra(package: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    done = called(CALLS[package], tmp_path, package)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(f"ValueError: {SAID[package]} (or -e '.[study]' in the repository)"), done.stderr


def test_a_smoke_job_ends_with_its_tables_without_any_of_them(tmp_path: Path) -> None:
    write_study(tmp_path / "study", lambda teacher, _, seed: 0.4 + 0.1 * bool(teacher) + seed / 100, seeds=2, teachers=["T"])
    code = "from pathlib import Path; from megakd.study.report import terminal; terminal.conclude(Path('study'))"
    done = called(code, tmp_path, "scipy", "sklearn", "matplotlib", "jinja2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"Methods compared", "Teachers and controls", "Cost"} <= {line.strip() for line in lines}
    assert "Differences are not tested, which takes scipy." in done.stdout
    assert "similarity over none, VQA: +10.0 points; by seed +10.0, +10.0" in lines
    assert lines[-1] == f"no report.html: {SAID['jinja2']} (or -e '.[study]' in the repository)"
    assert not (tmp_path / "study" / "report.html").exists()
