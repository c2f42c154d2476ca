"""`megakd submit` and `megakd jobs` on the real cluster: two nodes, preemption in both settings, a crash, what the cluster lacks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from submitit.core.utils import FailedJobError

from megakd.jobs import slurm as cluster
from megakd.jobs import status, submit
from megakd.runtime import checkpoint
from support.runs import NODE_LISTS, curve, megakd, rows, settings
from support.slurm_cluster import Cluster
from support.slurm_jobs import until, wait
from support.slurm_scripts import preempted

pytestmark = [pytest.mark.usefixtures("no_jobs_left"), pytest.mark.timeout(900)]
LONG = ("optim.steps=500", "checkpoint.every=100000")
TWO_NODES = ("--nodes", "2", "--gpus_per_node", "0", "--cpus_per_task", "1", "--mem", "1G", "--time", "15")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def submitted(run: Path) -> dict[str, str]:
    """The newest note of a submission in a run's folder."""
    return max((json.loads(path.read_text()) for path in (run / "slurm").glob("*.json")), key=lambda note: note["submitted"])


def shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The rows of `megakd jobs`."""
    capsys.readouterr()
    assert megakd("jobs", folder) == 0
    return capsys.readouterr().out.splitlines()[1:]


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, on two nodes, waited for by `megakd submit --wait`."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert megakd("submit", "--recipe", recipe_file, *settings(*LONG), "--out", out, *TWO_NODES, "--wait") == 0
    return out


def test_a_run_on_two_nodes_ends_and_its_folder_and_job_name_each_other(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note, content = submitted(undisturbed), json.loads((undisturbed / "run.json").read_text())
    seen = wait(note["job"])
    assert (seen["JobState"], seen["NumNodes"]) == ("COMPLETED", "2")
    assert seen["Comment"] == str(undisturbed)
    assert content["slurm_job_id"] == note["job"]
    assert content["ranks"] == 2
    assert content["jobs"][-1]["log"] == note["log"]
    assert content["argv"][0] == "megakd/train.py"
    assert "step 500/500" in Path(note["log"]).read_text()
    assert (undisturbed / "model").is_dir()
    (row,) = shown(undisturbed.parent, capsys)
    assert all(part in row for part in (str(undisturbed), note["job"], "finished", "500/500", note["log"]))


@pytest.mark.parametrize(("user_signal", "resume"), [pytest.param(True, "none", marks=pytest.mark.slow), (False, "auto")])
def test_a_preempted_run_goes_on_with_the_same_loss_curve(
    user_signal: bool, resume: str, undisturbed: Path, slurm: Cluster, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """user_signal: the cluster sends the signal that submitit asked for; else it sends SIGTERM alone, SLURM's default. Its tasks have no
    `scontrol` that works, as in a container."""
    run = tmp_path / "run"
    task = {"python": f'PATH="{tmp_path}:$PATH" exec {sys.executable} "$@"', "scontrol": f'echo "$*" >> {tmp_path}/asked; exit 127'}
    for name, text in task.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    options = (*TWO_NODES, "--python", tmp_path / "python", "--resume", resume)
    slurm.reconfigure(user_signal=user_signal)
    try:
        assert megakd("submit", "--recipe", recipe_file, *settings(*LONG), "--out", run, *options) == 0
        id = submitted(run)["job"]
        until(lambda: len(rows(run)) >= 5)
        with preempted(id, tmp_path) as higher:
            saved = rows(run)[-1]["step"]
            assert "PENDING again" in shown(run, capsys)[0]
        wait(higher)
        ended = wait(id)
    finally:
        slurm.reconfigure()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert 5 <= saved < 500
    assert curve(run) == curve(undisturbed)
    starts = json.loads((run / "run.json").read_text())["jobs"]
    assert [(start["slurm_job_id"], start["restarts"]) for start in starts] == [(id, 0), (id, 1)]
    assert len({start["log"] for start in starts}) == 1
    assert not (tmp_path / "asked").exists()


def test_a_crash_reaches_the_submitter_as_that_error_with_the_logs_path(
    slurm: Cluster, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    wanted = submit.Resources(nodes=2, gpus_per_node=1, tasks_per_node=1, time="15", signal_delay=60)
    top, runs = submit.requests(
        str(recipe_file), ["optim.lr=1e38", "optim.warmup=0", "optim.clip=0.0", "optim.steps=50"], None, run, "auto", []
    )
    submit.check(runs, wanted, "slurm", top)
    jobs = submit.submit(top, runs, wanted, "slurm")
    capsys.readouterr()
    assert submit.wait(jobs, "slurm") == 86
    said = capsys.readouterr().err
    log = submitted(run)["log"]
    assert "Lower optim.lr" in said
    assert f"log: {log.rsplit('_', 2)[0]}" in said
    assert "Traceback" not in said
    with pytest.raises(FailedJobError, match=r"Lower optim\.lr"):
        jobs[0].results()
    assert wait(jobs[0].job_id)["JobState"] == "FAILED"


def test_a_cancelled_run_is_not_requeued_and_ends_the_waiting(
    slurm: Cluster, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "SLURM_POLL_SECONDS", 1.0)
    monkeypatch.setattr(submit, "RESULT_SECONDS", 1.0)
    wanted = submit.Resources(nodes=2, gpus_per_node=0, tasks_per_node=1, time="15", signal_delay=60)
    top, runs = submit.requests(str(recipe_file), ["optim.steps=100000"], None, tmp_path / "run", "auto", [])
    jobs = submit.submit(top, runs, wanted, "slurm")
    until(lambda: len(rows(tmp_path / "run")) >= 3)
    assert "RUNNING" in shown(tmp_path, capsys)[0]
    subprocess.run(["scancel", jobs[0].job_id], check=True)
    assert submit.wait(jobs, "slurm") == 1
    assert "ended as CANCELLED without a result" in capsys.readouterr().err
    assert wait(jobs[0].job_id)["Restarts"] == "0"  # which is when its ranks have saved
    assert checkpoint.available(tmp_path / "run")


def test_what_the_cluster_lacks_is_said_in_one_message_before_anything_is_made(
    slurm: Cluster, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, answer in (
        (
            ("--partition", "nowhere"),
            "--partition nowhere: this cluster has no such partition; it has\n  main: 2 nodes with 8 GPUs, 64 CPUs",
        ),
        (("--gpus_per_node", "9"), "--gpus_per_node 9: partition main does not have 1 nodes of so many GPUs"),
        ((), "--gpus_per_node: say how many, 0 to train on the CPU; there are\n  main: 2 nodes with 8 GPUs"),
        (("--constraint", "h300", "--gpus_per_node", "0"), "sbatch refuses the job"),
        (("--nodes", "3", "--gpus_per_node", "0"), "--nodes 3 --gpus_per_node 0: partition main does not have 3 nodes"),
    ):
        code = megakd("submit", "--recipe", recipe_file, *settings("optim.batch=72"), "--out", tmp_path / "run", *options)
        said = capsys.readouterr().err
        assert code == 2, (options, said)
        assert answer in said
        assert "Traceback" not in said
    assert list((tmp_path / "run" / "slurm").iterdir()) == []


def test_a_dry_run_prints_the_batch_file_and_submits_nothing(
    slurm: Cluster, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = subprocess.run(["squeue", "-h", "-t", "all"], capture_output=True, text=True, check=True).stdout
    options = ("--gpus_per_node", "8", "--nodes", "2", "--partition", "main", "--constraint", "a100", "--time", "1-00:00:00")
    site = ("--setup", "source site.sh", "--container_image", "/images/megakd.sqsh", "--cpus_per_task", "4", "--dry_run")
    assert megakd("submit", "--recipe", recipe_file, "--out", tmp_path / "run", *options, *site) == 0
    text = capsys.readouterr().out.splitlines()
    for line in (
        "--time=1440",
        "--nodes=2",
        "--gpus-per-node=8",
        "--ntasks-per-node=8",
        "--constraint=a100",
        "--requeue",
        "--open-mode=append",
    ):
        assert f"#SBATCH {line}" in text
    assert f"#SBATCH --comment={tmp_path / 'run'}" in text
    assert {"#SBATCH --signal=USR2@180", "source site.sh", "export SRUN_CPUS_PER_TASK=4"} <= set(text)
    (command,) = [line for line in text if line.startswith("srun ")]
    assert text.index("source site.sh") < text.index(command) < text.index("code=$?") < text.index("requeue() {")
    assert "#SBATCH --open-mode=append" in text
    assert "--container-image=/images/megakd.sqsh" in command
    assert "--kill-on-bad-exit=1" in command
    assert not (tmp_path / "run").exists()
    assert subprocess.run(["squeue", "-h", "-t", "all"], capture_output=True, text=True, check=True).stdout == before


def test_the_first_of_a_list_of_nodes_is_the_one_that_slurm_names(slurm: Cluster) -> None:
    for nodes, first in NODE_LISTS:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        assert shown.stdout.split()[0] == first


def test_an_array_is_one_job_with_a_run_folder_for_each_combination(
    slurm: Cluster, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held in the queue: its tasks' training is what the other tests run."""
    arrays = ("--array", "seed=0,1", "--array", "optim.lr=1e-3,1e-4")
    options = ("--setup", "sleep 600", "--nodes", "2", "--gpus_per_node", "0")
    assert megakd("submit", "--recipe", recipe_file, "--out", tmp_path / "sweep", *arrays, *options) == 0
    runs = [tmp_path / "sweep" / f"seed={seed},optim.lr={lr}" for seed, lr in itertools.product("01", ("1e-3", "1e-4"))]
    ids = [submitted(run)["job"] for run in runs]
    main = ids[0].split("_")[0]
    assert ids == [f"{main}_{number}" for number in range(4)]
    states = cluster.states(ids)
    assert set(states) == set(ids)
    listed = shown(tmp_path, capsys)
    assert [line.split()[0] for line in listed] == sorted(map(str, runs))
    subprocess.run(["scancel", main], check=True)
    until(lambda: all(state.ended for state in cluster.states(ids).values()))
    assert {found.job for found in status.find(tmp_path)} == set(ids)
