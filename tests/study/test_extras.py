"""What a study needs beyond megakd's own libraries, in an environment that lacks it: one message with the way to install it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support.runs import REPOSITORY

CALLS = {
    "scipy": "from megakd.study.statistics import paired_gain; paired_gain({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.3})",
    "sklearn": "from pathlib import Path; from megakd.data.digits import write_digits; write_digits(Path('digits'), train=2, test=2)",
    "matplotlib": "from megakd.study.report.drawing import matplotlib; matplotlib()",
    "jinja2": "from pathlib import Path; from megakd.study import found_runs; from megakd.study.report import page; "
    "page.make(found_runs.read([Path('run')]), Path('out'), [])",
}
SAID = {
    "scipy": "the statistics of a study need scipy, which is not there (No module named 'scipy'); `pip install scipy`",
    "sklearn": "handwritten digits need scikit-learn, which is not there (No module named 'sklearn'); `pip install scikit-learn`",
    "matplotlib": "a report's figures need matplotlib, which is not there (No module named 'matplotlib'); `pip install matplotlib`",
    "jinja2": "a report's page needs jinja2, which is not there (No module named 'jinja2'); `pip install jinja2`",
}


@pytest.mark.parametrize("package", CALLS)
def test_one_message_names_what_is_missing_and_the_extra(package: str, tmp_path: Path) -> None:
    """This environment's packages but one, as links in another folder."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name != package and not entry.name.endswith(".pth"):
            (packages / entry.name).symlink_to(entry)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels", packages)))
    done = subprocess.run(
        [sys.executable, "-S", "-c", CALLS[package]], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(f"ValueError: {SAID[package]} (or -e '.[study]' in the repository)"), done.stderr
