"""`megakd doctor` on both nodes of a real job, whose GPUs are pretended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs import REPOSITORY, environment
from support.slurm_cluster import Cluster

pytestmark = [pytest.mark.usefixtures("no_jobs_left"), pytest.mark.timeout(900)]


def test_each_node_tells_its_job_its_rank_and_that_torch_cannot_use_its_gpu(slurm: Cluster, tmp_path: Path) -> None:
    wanted = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=2G", f"--output={tmp_path}/%t.json")
    topics = ("--only", "devices", "--only", "ranks", "--only", "slurm")
    command = [sys.executable, "-m", "megakd.cli", "doctor", "--json", *topics]
    done = subprocess.run(["srun", *wanted, *command], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    told = []
    for rank in range(2):
        content = json.loads((tmp_path / f"{rank}.json").read_text())
        told.append(found := {f"{row['topic']}.{row['name']}": row for row in content["findings"]})
        assert [name for name, row in found.items() if row["mark"] == "fails"] == ["devices.gpus"], found
        assert "SLURM gave this job 1, and torch" in found["devices.gpus"]["said"]
        facts = found["ranks.launcher"]["facts"]
        assert (facts["rank"], facts["size"], facts["meet_at"], facts["address"]) == (rank, 2, "node1", slurm.address("node1"))
        assert found["slurm.job"]["facts"]["job_nodelist"] == "node[1-2]"
        assert len(found["slurm.cluster"]["facts"]["partitions"]) == 2
    assert told[0]["slurm.job"]["facts"]["id"] == told[1]["slurm.job"]["facts"]["id"]
