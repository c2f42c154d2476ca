"""Each launcher's variables are read as that launcher means them, and ranks that meet over IPv6."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megakd.runtime import launch, peers
from support.processes import start
from support.runs import LAUNCHER_VARIABLES, NODE_LISTS, environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SRUN = {
    **{"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "8"},
    **{"SLURM_JOB_NODELIST": "gpu[01-04]", "SLURM_STEP_NODELIST": "gpu[02-03]", "SLURM_JOB_ID": "4711"},
}
SUBMITIT = {
    **{"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "98765"},
    **{"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_NTASKS": "2"},
}


@pytest.fixture(autouse=True)
def _no_scontrol(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: nothing here may ask SLURM's programs. What starts processes keeps its PATH."""
    if "ipv6" not in request.node.name:
        monkeypatch.setenv("PATH", "")


def test_torchrun_and_deepspeed_are_taken_at_their_word() -> None:
    assert launch.variables({**TORCHRUN, "HOME": "/root", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}) == TORCHRUN


@pytest.mark.parametrize("absent", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_without_the_rest_is_refused_by_name(absent: str) -> None:
    with pytest.raises(ValueError, match=f"RANK is set but {absent} is not"):
        launch.variables({name: value for name, value in TORCHRUN.items() if name != absent})


def test_a_step_of_srun_is_ranked_by_the_step_and_meets_at_its_first_node() -> None:
    found = launch.variables(SRUN)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "8", "1")
    assert found["MASTER_ADDR"] == "gpu02"
    assert int(found["MASTER_PORT"]) == launch.port(4711)


def test_neighbouring_jobs_restarts_and_steps_meet_at_ports_of_their_own_below_those_that_linux_hands_out() -> None:
    starts = list(product(range(22000, 22064), range(8), range(4)))
    ports = {launch.port(*start) for start in starts}
    assert len(ports) == len(starts)
    assert min(ports) >= 10240
    assert max(ports) < 32768
    interactive = 4294967290  # SLURM_STEP_ID of salloc's shell
    assert 10240 <= launch.port(2**26, 100, interactive) < 32768


def test_a_requeued_job_and_a_second_step_meet_at_other_ports() -> None:
    changes = [{}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "2"}, {"SLURM_STEP_ID": "1"}]
    assert len({launch.variables(SRUN | change)["MASTER_PORT"] for change in changes}) == 4


@pytest.mark.parametrize(("environ", "address"), [(SRUN, "10.9.9.9"), (SUBMITIT, "10.9.9.9"), (SRUN, "fd00::2"), (SRUN, "[fd00::2]")])
def test_an_address_and_port_given_by_the_user_win(environ: dict[str, str], address: str) -> None:
    found = launch.variables({**environ, "MASTER_ADDR": address, "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == (address.strip("[]"), "1234")


@pytest.mark.parametrize(("nodes", "first"), NODE_LISTS)
def test_the_first_of_a_list_of_nodes_is_where_they_meet(nodes: str, first: str) -> None:
    """tests/slurm holds the same against `scontrol show hostnames`."""
    assert launch.variables(SRUN | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


@pytest.mark.parametrize("nodes", ["gpu[7", "gpu7]", "", "gpu[]", "gpu[a-b]"])
def test_a_node_list_that_is_not_understood_is_named_with_the_remedy(nodes: str) -> None:
    with pytest.raises(ValueError, match=r"MASTER_ADDR: the list of nodes .* export MASTER_ADDR=\$\(scontrol show hostnames") as error:
        launch._first_host(nodes)
    assert repr(nodes) in str(error.value)


@pytest.mark.parametrize(
    ("tasks", "node", "here"), [("4", "0", "4"), ("2(x3),1", "2", "2"), ("2(x3),1", "3", "1"), ("3,2(x2)", "0", "3"), (None, "1", "8")]
)
def test_the_ranks_of_one_machine_are_counted_as_slurm_lays_them_out(tasks: str | None, node: str, here: str) -> None:
    laid_out = {"SLURM_NODEID": node} | ({} if tasks is None else {"SLURM_STEP_TASKS_PER_NODE": tasks})
    assert launch.variables(SRUN | laid_out)["LOCAL_WORLD_SIZE"] == here


def test_a_task_of_submitit_on_this_machine_is_a_rank_whatever_slurm_shell_it_was_started_in() -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    assert launch.variables(SRUN | SUBMITIT) == {**place, "MASTER_PORT": str(launch.port(98765))}


def test_a_task_of_submitit_on_slurm_is_a_task_of_srun() -> None:
    assert launch.variables(SRUN | SUBMITIT | {"SUBMITIT_EXECUTOR": "slurm"}) == launch.variables(SRUN)


def test_python_in_a_batch_script_is_one_process_although_slurm_names_a_rank() -> None:
    batch_script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert launch.variables(batch_script)["WORLD_SIZE"] == "1"


@pytest.mark.parametrize("special", ["4294967290", "4294967291", "4294967292"])
def test_python_in_the_shell_that_salloc_gives_is_one_process(special: str) -> None:
    """With LaunchParameters=use_interactive_step that shell is a step of SLURM's own, and SLURM_NTASKS is the whole allocation's."""
    shell = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NUM_TASKS"}
    assert launch.variables({**shell, "SLURM_STEP_ID": special, "SLURM_NTASKS": "8"})["WORLD_SIZE"] == "1"


def test_a_shell_of_srun_with_pty_does_not_wait_long_for_tasks_that_never_come() -> None:
    found = launch.variables(SRUN)
    assert launch._meeting(found, {**SRUN, "SLURM_PTY_PORT": "40001"}).timeout == peers.MEETING_SECONDS_AT_A_TERMINAL == 30
    assert launch._meeting(found, SRUN).timeout == peers.MEETING_SECONDS


OPEN_MPI = {
    **{"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    "PMIX_NAMESPACE": "prterun-node7-4711@1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "9"}


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA, SRUN | OPEN_MPI, SRUN | HYDRA])
def test_a_rank_of_mpirun_is_one_also_where_its_daemons_are_tasks_of_srun(environ: dict[str, str]) -> None:
    found = launch.variables(environ)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("1", "2", "1", "2")
    assert found["MASTER_ADDR"] == "localhost"
    first = {name: "0" if name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK") else value for name, value in environ.items()}
    assert (launch.variables(first)["RANK"], launch.variables(first)["MASTER_PORT"]) == ("0", found["MASTER_PORT"])


def test_srun_with_pmi2_is_srun() -> None:
    assert launch.variables(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}) == launch.variables(SRUN)


@pytest.mark.parametrize("environ", [OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, HYDRA | {"PMI_SIZE": "4"}])
def test_mpirun_on_several_machines_is_asked_where_they_meet(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"mpirun started 4 ranks, 2 of them on this machine.*-x MASTER_ADDR"):
        launch.variables(environ)
    found = launch.variables({**environ, "MASTER_ADDR": "node7", "MASTER_PORT": "29500"})
    assert (found["WORLD_SIZE"], found["MASTER_ADDR"], found["MASTER_PORT"]) == ("4", "node7", "29500")


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE = 4 is set but RANK is not"),
        (TORCHRUN | {"RANK": "8"}, "RANK = 8 and WORLD_SIZE = 8: ranks count from 0 to WORLD_SIZE - 1"),
        (TORCHRUN | {"RANK": "-1"}, "RANK = -1"),
        (TORCHRUN | {"RANK": "one"}, "RANK = 'one': not an integer"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE = '': not an integer"),
        (TORCHRUN | {"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE = 0"),
        (TORCHRUN | {"LOCAL_RANK": "9" * 30}, "LOCAL_RANK = '9999"),
        (TORCHRUN | {"LOCAL_RANK": "-2"}, "LOCAL_RANK = -2"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT = 70000: give a port"),
        (TORCHRUN | {"MASTER_PORT": "tcp://x"}, "MASTER_PORT = 'tcp://x': not an integer"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT = 0"),
        (TORCHRUN | {"MASTER_ADDR": " "}, "MASTER_ADDR is empty"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID = 'x': not an integer"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2(x3)"}, r"SLURM_STEP_NUM_TASKS = '2\(x3\)': not an integer"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_JOB_ID"}, "SLURM_JOB_ID is not set"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
        ({name: value for name, value in SRUN.items() if not name.endswith("NODELIST")}, "SLURM_JOB_NODELIST is not set"),
        (SUBMITIT | {"SUBMITIT_LOCAL_JOB_ID": "x"}, "SUBMITIT_LOCAL_JOB_ID = 'x'"),
    ],
)
def test_variables_that_say_nothing_or_nonsense_are_named(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        launch.variables(environ)


def test_a_plain_process_is_rank_0_of_1() -> None:
    found = launch.variables({"PATH": "/bin"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("0", "1", "0")


@pytest.mark.parametrize(
    ("local_rank", "local_size", "visible", "index"),
    [
        (3, 8, 8, 3),  # all GPUs of the machine are visible to each of its tasks
        (3, 8, 1, 0),  # srun --gpus-per-task=1
        (1, 2, 8, 1),  # fewer tasks than GPUs
        (0, 1, 1, 0),
    ],
)
def test_a_rank_takes_its_own_device_whether_it_sees_one_or_all(local_rank: int, local_size: int, visible: int, index: int) -> None:
    assert launch.device_index(local_rank, local_size, visible) == index


@pytest.mark.parametrize("local_rank", range(4))
def test_every_task_of_a_machine_refuses_when_two_would_share_a_device(local_rank: int) -> None:
    """Every one, so that none waits for the others."""
    with pytest.raises(ValueError, match=r"4 tasks on this machine see 2 GPUs.*--ntasks-per-node=2 or --gpus-per-node=4"):
        launch.device_index(local_rank, 4, 2)


@pytest.mark.parametrize(("watchdog", "expected"), [(100.0, timedelta(seconds=400)), (0.0, timedelta(minutes=30))])
def test_collectives_of_all_groups_outwait_the_watchdog(watchdog: float, expected: timedelta, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER_VARIABLES, "SLURM_STEP_ID", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    launch.start()
    try:
        groups = [dist.group.WORLD, dist.new_group([0])]
        launch.wait_longer_than(watchdog)
        assert [group._get_backend(torch.device("cpu")).options._timeout for group in groups] == [expected, expected]
    finally:
        launch.stop()
        for name in launch.TORCH_VARIABLES:  # monkeypatch puts back what was there, and removes nothing else
            os.environ.pop(name, None)


MEETING = """
import json, torch, torch.distributed as dist
from megakd.runtime import collectives, launch
world = launch.start()
total = collectives.start_sum(torch.tensor([1.0 + world.rank]), world).read()
print(json.dumps([world.rank, world.size, total, collectives.share(world.rank, world)]))
launch.stop()
"""


@pytest.mark.parametrize("address", ["[::1]", "a-host-with-ipv6-alone"])
def test_two_ranks_meet_over_ipv6(address: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 on this machine ({error})")
    command = [sys.executable, "-c", MEETING]
    if not address.startswith("["):
        (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n127.0.0.1 {socket.gethostname()}\n::1 {address}\n")
        with_hosts = ["unshare", "--mount", "sh", "-c", f'mount --bind {tmp_path}/hosts /etc/hosts && exec "$@"', "sh"]
        if shutil.which("unshare") is None or subprocess.run([*with_hosts, "true"], capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount another /etc/hosts; the address itself is tried above")
        command = with_hosts + command
    shared = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(os.getpid())}
    environments = [environment(MASTER_ADDR=address, SLURM_PROCID=rank, SLURM_LOCALID=rank, **shared) for rank in "01"]
    ranks = [start(*command, env=one) for one in environments]
    try:
        printed = [process.communicate(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [json.loads(out) if out else error for out, error in printed] == [[0, 2, [3.0], 0], [1, 2, [3.0], 0]]


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "[::1]"])
def test_a_loopback_address_in_a_job_of_several_nodes_is_refused(address: str) -> None:
    """Left over in the submitting shell, it would have every node wait for the others on itself."""
    with pytest.raises(ValueError, match=r"MASTER_ADDR = .* in a job on 2 nodes.*unset it"):
        launch.variables(SRUN | {"SLURM_JOB_NUM_NODES": "2", "MASTER_ADDR": address})
    assert launch.variables(SRUN | {"SLURM_JOB_NUM_NODES": "1", "MASTER_ADDR": address})["MASTER_ADDR"] == address.strip("[]")


def test_the_environment_is_as_before_when_the_process_group_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "4711")
    before = dict(os.environ)
    launch.start()
    assert os.environ["WORLD_SIZE"] == "1"
    launch.stop()
    assert dict(os.environ) == before
