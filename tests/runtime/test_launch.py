"""Each launcher's variables are read as that launcher means them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.runtime import launch

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[01-04]",
    "SLURM_STEP_NODELIST": "gpu[02-03]",
    "SLURM_JOB_ID": "4711",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster's `scontrol`, as far as it is asked."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[02-03]" ] || exit 1\nprintf "10.1.0.2\\n10.1.0.3\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_torchrun_and_deepspeed_are_taken_at_their_word() -> None:
    assert launch.variables({**TORCHRUN, "HOME": "/root", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}) == TORCHRUN


@pytest.mark.parametrize("absent", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_without_the_rest_is_refused_by_name(absent: str) -> None:
    with pytest.raises(ValueError, match=f"RANK is set but {absent} is not"):
        launch.variables({name: value for name, value in TORCHRUN.items() if name != absent})


@pytest.mark.usefixtures("scontrol")
def test_a_step_of_srun_is_ranked_by_the_step_and_meets_at_its_first_node() -> None:
    found = launch.variables(SRUN)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "8", "1")
    assert found["MASTER_ADDR"] == "10.1.0.2"
    assert 20000 <= int(found["MASTER_PORT"]) < 40000


@pytest.mark.usefixtures("scontrol")
def test_a_requeued_job_meets_at_another_port() -> None:
    ports = {launch.variables({**SRUN, "SLURM_RESTART_COUNT": str(count)})["MASTER_PORT"] for count in range(3)}
    assert len(ports) == 3


@pytest.mark.usefixtures("scontrol")
def test_an_address_and_port_given_by_the_user_win_under_srun() -> None:
    found = launch.variables({**SRUN, "MASTER_ADDR": "10.9.9.9", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.9.9.9", "1234")


def test_python_in_a_batch_script_is_one_process_although_slurm_names_a_rank() -> None:
    batch_script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert launch.variables(batch_script)["WORLD_SIZE"] == "1"


def test_a_plain_process_is_rank_0_of_1() -> None:
    found = launch.variables({"PATH": "/bin"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("0", "1", "0")
