"""What can be said of the scripts without a cluster: their syntax, and that what they name is there and sound."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.runs import REPOSITORY, settings, train

SCRIPTS = [*sorted((REPOSITORY / "slurm").glob("*.sh")), REPOSITORY / "megakd" / "jobs" / "requeue.sh"]
JOBS = [path for path in SCRIPTS if "#SBATCH" in path.read_text()]


@pytest.mark.parametrize("script", [*SCRIPTS, REPOSITORY / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_pass_bash_and_shellcheck(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        (pytest.fail if os.environ.get("SLURM_TESTS") == "require" else pytest.skip)("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "--external-sources", script], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_each_job_is_requeued_signalled_and_logged_to_a_place_that_exists(script: Path) -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script.read_text(), re.MULTILINE))
    assert {"requeue", "signal", "time"} <= set(options)
    assert options["open-mode"] == "append"
    assert "/" not in options["output"]


@pytest.mark.parametrize("name", ["distill_vitbigG", "distill_eva02E"])
def test_the_recipe_and_the_json_that_a_script_names_pass_the_dry_run(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As README calls it, full-size models included; only the data are others, and the batch is that of one process."""
    monkeypatch.chdir(REPOSITORY)
    command = re.search(r"megakd/train.py --recipe (\S+) --ds_config (\S+)", (REPOSITORY / "slurm" / f"{name}.sh").read_text())
    assert command is not None
    data = (
        f"data.train={world}/train/*.tar",
        "optim.batch=4",
    )
    done = train(command[1], "--ds_config", command[2], "--out", tmp_path / "run", "--dry_run", *settings(*data))
    assert done.code == 0, done.err
    assert "zero3_int8" in done.out


@pytest.mark.parametrize("name", ["distill_vitbigG", pytest.param("distill_eva02E", marks=pytest.mark.slow)])
def test_a_job_fits_the_gpus_that_its_header_names_and_takes_what_it_says(name: str) -> None:
    from megakd.planning import plan as planner
    from megakd.recipe import load as recipes

    recipe, origin = recipes.load(name)
    made = planner.plan(recipe, origin, str(REPOSITORY / "ds_configs" / "zero1_bf16.json"), planner.Cluster(32, 80, 8, "h100"))
    said = re.search(r"Memory: ([\d.]+) GB of 80", (REPOSITORY / "slurm" / f"{name}.sh").read_text())
    assert said is not None
    asked = next(row for row in made.rows if row.mode.name == made.asked)
    assert asked.fits(made.cluster.usable)
    assert asked.bytes / 1e9 == pytest.approx(float(said[1]), abs=0.1)
