"""Two machines without a scheduler: `deepspeed --hostfile`, by ssh and without, and torchrun train the curve of one machine."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.runs import TRAIN, curve, finish, ran, settings, start_ranks
from support.slurm_cluster import NODES
from support.two_hosts import Hosts, deepspeed, why_not

# steps may then grow between two starts
SETS = ("optim.schedule=constant", "optim.warmup=0", "objectives.contrastive=1.0")
STEPS = 6
PORT = "29400"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = why_not()
    if reason and os.environ.get("SLURM_TESTS") == "require":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    folder.chmod(0o755)
    here = Hosts(folder)
    here.start()
    try:
        yield here
    finally:
        here.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def one_machine(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks on this machine."""
    out = tmp_path_factory.mktemp("one") / "run"
    ended = [finish(rank) for rank in start_ranks(*arguments(recipe_file, out))]
    assert [one.code for one in ended] == [0, 0], ended
    return out


def arguments(recipe: Path, out: Path, steps: int = STEPS) -> list[str]:
    return ["--recipe", str(recipe), "--out", str(out), *settings(*SETS, f"optim.steps={steps}")]


def by_ssh(hosts: Hosts, *arguments: str) -> None:
    """From one machine, which starts the other by pdsh over ssh."""
    hostfile = hosts.folder / "hostfile"
    (hosts.folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\n")
    command = [*deepspeed(), "--hostfile", hostfile, "--master_port", PORT, TRAIN, *arguments]
    ended = finish(hosts.on(NODES[0], *command, folder=hosts.folder))
    assert ended.code == 0, ended.out
    assert f"{NODES[1]}: " in ended.out


def without_ssh(hosts: Hosts, *arguments: str) -> None:
    """The same command on each machine, with the machine's number."""
    places = ["--no_ssh", "--master_addr", NODES[0], "--master_port", PORT]
    started = [
        hosts.on(node, *deepspeed(), "--hostfile", hosts.folder / "hostfile", *places, "--node_rank", str(number), TRAIN, *arguments)
        for number, node in enumerate(NODES)
    ]
    ended = [finish(one) for one in started]
    assert [one.code for one in ended] == [0, 0], ended


def by_torchrun(hosts: Hosts, *arguments: str) -> None:
    """The same command on each machine; who has which ranks they agree themselves."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NODES[0]}:{PORT}", "--rdzv-id", "job"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting, TRAIN, *arguments]
    ended = [finish(one) for one in [hosts.on(node, *command) for node in NODES]]
    assert [one.code for one in ended] == [0, 0], ended


LAUNCHERS = {"deepspeed --hostfile": by_ssh, "deepspeed --no_ssh": without_ssh, "torchrun": by_torchrun}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if place else []) for place, name in enumerate(LAUNCHERS)])
def test_two_machines_train_the_curve_of_one(name: str, hosts: Hosts, one_machine: Path, recipe_file: Path, tmp_path: Path) -> None:
    """To the last bit: gloo adds up two numbers, whichever machines they come from."""
    LAUNCHERS[name](hosts, *arguments(recipe_file, tmp_path / "run"))
    assert curve(tmp_path / "run") == curve(one_machine)
    assert len(curve(tmp_path / "run")) == STEPS


@pytest.mark.slow
def test_each_launcher_goes_on_where_another_has_stopped(hosts: Hosts, one_machine: Path, recipe_file: Path, tmp_path: Path) -> None:
    """The checkpoint lies on the shared folder; the last start is of one rank, on another machine than both."""
    run = tmp_path / "run"
    for number, start in enumerate(LAUNCHERS.values(), 1):
        start(hosts, *arguments(recipe_file, run, number))
        assert len(curve(run)) == number
    assert curve(run) == curve(one_machine)[: len(LAUNCHERS)]
    ran(recipe_file, run, *SETS, f"optim.steps={STEPS}")
    assert [row[1] for row in curve(run)] == pytest.approx([row[1] for row in curve(one_machine)], rel=1e-5)
