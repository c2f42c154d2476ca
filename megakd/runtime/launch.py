"""This process's rank, under torchrun, `deepspeed`, `srun`, `mpirun`, submitit and a plain `python`.

Each launcher has its own variables; `start` reads them, writes torch's (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, which
DeepSpeed reads as well) and joins the process group: NCCL for CUDA tensors, gloo for CPU ones.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megakd.runtime import peers, precision

_peers: peers.Peers | None = None  # of the process group that `start` has joined, where there are several ranks
_before: dict[str, str | None] = {}  # what `start` has overwritten in the environment, None for what was not there
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Ports of rendezvous: PORTS is prime, and all are below 32768, from where on Linux gives ports to whoever connects
# (net.ipv4.ip_local_port_range). The strides keep a job's neighbours, restarts and steps apart.
FIRST_PORT, PORTS = 10240, 22003
RESTART_STRIDE, STEP_STRIDE = 1009, 7919
# From here on steps are SLURM's own, as the batch script and the shell of salloc (slurm.h, SLURM_INTERACTIVE_STEP).
FIRST_SPECIAL_STEP = 0xFFFFFFF0
# What names one mpirun: Open MPI's (PRRTE, ORTE), then MPICH's and Intel MPI's.
MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "HYDRA_JOBID", "PMI_JOBID")
# The process group waits longer than the watchdog, which says more about a hang than a timeout of NCCL or gloo.
AFTER_WATCHDOG = timedelta(minutes=5)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torch's five rendezvous variables by this process's launcher, and LOCAL_WORLD_SIZE where it is known.

    A task of submitit on SLURM is a task of srun. Raises ValueError for missing or impossible variables, and when neither SLURM's list of
    nodes nor mpirun says where the ranks meet.
    """
    if "RANK" in environ:
        rendezvous = _as_given(environ)
    elif environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in environ:
        rendezvous = _submitit_local(environ)
    # Before SLURM: mpirun starts its daemons by srun, whose variables the ranks inherit.
    elif "OMPI_COMM_WORLD_RANK" in environ:
        rendezvous = _mpirun(
            environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
        )
    elif "PMI_RANK" in environ and "MPI_LOCALRANKID" in environ:  # of MPICH and Intel MPI; srun --mpi=pmi2 sets the first alone
        rendezvous = _mpirun(environ, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    elif _is_task_of_srun(environ):
        rendezvous = _slurm(environ)
    else:
        return _alone(environ)
    # torch's store takes an IPv6 address without a URL's brackets
    return _checked({**rendezvous, "MASTER_ADDR": re.sub(r"^\[(.*)\]$", r"\1", rendezvous["MASTER_ADDR"])})


def _checked(rendezvous: dict[str, str]) -> dict[str, str]:
    """Raises ValueError for numbers that are none, and ranks that cannot be."""
    rank, size = _number(rendezvous, "RANK"), _number(rendezvous, "WORLD_SIZE")
    local, port_ = _number(rendezvous, "LOCAL_RANK"), _number(rendezvous, "MASTER_PORT")
    if size < 1 or not 0 <= rank < size:
        raise ValueError(
            f"RANK = {rank} and WORLD_SIZE = {size}: ranks count from 0 to WORLD_SIZE - 1; start with torchrun, deepspeed or srun"
        )
    if not 0 <= local < size:
        raise ValueError(f"LOCAL_RANK = {local} of {size} ranks: they count from 0; start with torchrun, deepspeed or srun")
    if not 0 <= port_ < 65536 or (port_ == 0 and size > 1):
        raise ValueError(f"MASTER_PORT = {port_}: give a port from 1024 to 65535, the same on all ranks")
    if not rendezvous["MASTER_ADDR"].strip():
        raise ValueError("MASTER_ADDR is empty: give the name or the address of the machine of rank 0, or unset it")
    return rendezvous


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None:
        raise ValueError(f"{name} is not set, though other variables of its launcher are: start with torchrun, deepspeed, srun or mpirun")
    if not re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text, re.ASCII):
        raise ValueError(f"{name} = {text!r}: not an integer; it is for the launcher to set (torchrun, deepspeed, srun or mpirun)")
    return int(text)


def _alone(environ: Mapping[str, str]) -> dict[str, str]:
    if environ.get("WORLD_SIZE") and _number(environ, "WORLD_SIZE") > 1:
        raise ValueError(
            f"WORLD_SIZE = {environ['WORLD_SIZE']} is set but RANK is not: start with torchrun, deepspeed or srun, or unset WORLD_SIZE for "
            f"one process"
        )
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def _is_task_of_srun(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task.

    A batch script's own `python` has SLURM_PROCID too, but no SLURM_STEP_ID; what is started in salloc's shell has SLURM's own step.
    """
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return False
    return _number(environ, "SLURM_STEP_ID") < FIRST_SPECIAL_STEP


def _as_given(environ: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in TORCH_VARIABLES if name not in environ]
    if missing:
        raise ValueError(
            f"RANK is set but {', '.join(missing)} is not: start with torchrun, deepspeed or srun, or unset RANK for one process"
        )
    # torchrun's name, then the deepspeed launcher's
    here = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    return {name: environ[name] for name in TORCH_VARIABLES} | ({"LOCAL_WORLD_SIZE": here} if here else {})


def _mpirun(environ: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> dict[str, str]:
    """A rank of mpirun, which does not say where the ranks meet: on several machines the user does."""
    ranks, here = _number(environ, size), _number(environ, local_size)
    host, port_ = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if ranks > here and not host:
        raise ValueError(
            f"mpirun started {ranks} ranks, {here} of them on this machine, and does not say where they meet: "
            f"mpirun -x MASTER_ADDR=$(hostname) -x MASTER_PORT=29500 ... (Intel MPI, MPICH: -genv NAME VALUE), on rank 0's machine; or "
            f"start with srun or torchrun"
        )
    # the same for all ranks of one mpirun, and another for the next
    job = next((environ[name] for name in MPI_JOBS if environ.get(name)), str(os.getppid()))
    return {
        "RANK": str(_number(environ, rank)),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(_number(environ, local_rank)),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": host or "localhost",
        "MASTER_PORT": port_ or str(port(zlib.crc32(job.encode()))),
    }


def _submitit_local(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        "RANK": str(_number(environ, "SUBMITIT_LOCAL_GLOBALID")),
        "WORLD_SIZE": str(_number(environ, "SUBMITIT_LOCAL_NTASKS")),
        "LOCAL_RANK": str(_number(environ, "SUBMITIT_LOCAL_LOCALID")),
        "LOCAL_WORLD_SIZE": environ["SUBMITIT_LOCAL_NTASKS"],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or "localhost",
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port(_number(environ, "SUBMITIT_LOCAL_JOB_ID"))),
    }


def _slurm(environ: Mapping[str, str]) -> dict[str, str]:
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS")
    nodes = _number(environ, "SLURM_STEP_NUM_NODES" if environ.get("SLURM_STEP_NUM_NODES") else "SLURM_JOB_NUM_NODES", "1")
    if nodes > 1 and environ.get("MASTER_ADDR", "").strip("[]") in LOOPBACK:
        raise ValueError(
            f"MASTER_ADDR = {environ['MASTER_ADDR']!r} in a job on {nodes} nodes: each would look for the others on itself; unset it "
            f"where the job is submitted, and the first node's name is taken"
        )
    # An array's tasks have job ids of their own here. A restarted job must not meet a stale peer of its earlier start.
    meeting = port(_number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_RESTART_COUNT", "0"), _number(environ, "SLURM_STEP_ID"))
    where = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not where and not environ.get("MASTER_ADDR"):
        raise ValueError(
            "SLURM_JOB_NODELIST is not set, so nobody says where the ranks meet: hand it on (srun --export=ALL), or set MASTER_ADDR"
        )
    return {
        "RANK": str(_number(environ, "SLURM_PROCID")),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(_number(environ, "SLURM_LOCALID")),
        "LOCAL_WORLD_SIZE": str(_tasks_on_this_node(environ, tasks)),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(where or ""),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(meeting),
    }


def port(job: int, restart: int = 0, step: int = 0) -> int:
    """Where the ranks of a job meet; neighbours, restarts and other steps have another port, see FIRST_PORT."""
    return FIRST_PORT + (job + RESTART_STRIDE * restart + STEP_STRIDE * step) % PORTS


def free_port() -> int:
    """One that no program of this machine has now; DeepSpeed's default, 29500, is taken where another run is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tasks_on_this_node(environ: Mapping[str, str], tasks: int) -> int:
    """By the step's run lengths, "2(x3),1"; without them one node runs all."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = _number(environ, "SLURM_NODEID", "0")
    return counts[node] if node < len(counts) else tasks


def _first_host(nodes: str) -> str:
    """Of "rack[1-2]gpu[07-10,12],login1", rack1gpu07: as `scontrol show hostnames` has it, which a container may lack."""
    first = re.match(r"((?:[^\[\],]|\[\d[\d,-]*\])+)(?:,|$)", nodes)
    if not first:
        raise ValueError(
            f"MASTER_ADDR: the list of nodes {nodes!r} is not understood, so nobody says where the ranks meet; in the batch script, before "
            'srun: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[1])


def start(timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the process group and choose this rank's device.

    timeout: of collectives, until `wait_longer_than` is called. Raises ValueError with the remedy as `variables` and `peers.meet` do, and
    on every rank where the ranks would compute in different types.
    """
    global _peers
    rendezvous = variables(os.environ)
    rank, size, local_rank = int(rendezvous["RANK"]), int(rendezvous["WORLD_SIZE"]), int(rendezvous["LOCAL_RANK"])
    if size > 1 and not dist.is_initialized():
        place = _meeting(rendezvous, os.environ)
        store, connection = peers.meet(place)
        _peers = peers.Peers(rank, size, store, connection, place.attempt)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        index = device_index(local_rank, int(rendezvous.get("LOCAL_WORLD_SIZE", local_rank + 1)), torch.cuda.device_count())
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
        # DeepSpeed takes LOCAL_RANK for the device's number (its engine, zero.Init and zero/utils.py)
        rendezvous["LOCAL_RANK"] = str(index)
    _before.update({name: os.environ.get(name) for name in rendezvous if name not in _before})
    os.environ.update(rendezvous)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        common = dist.HashStore() if size == 1 else dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=common, rank=rank, world_size=size, timeout=timeout)
    if size > 1:
        precision.check_alike(device, size)
    return World(rank, size, device)


def _meeting(rendezvous: Mapping[str, str], environ: Mapping[str, str]) -> peers.Meeting:
    return peers.Meeting(
        rank=int(rendezvous["RANK"]),
        size=int(rendezvous["WORLD_SIZE"]),
        host=rendezvous["MASTER_ADDR"],
        port=int(rendezvous["MASTER_PORT"]),
        agent=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        # in a shell of `srun --pty` one process takes itself for one of several tasks
        timeout=peers.MEETING_SECONDS_AT_A_TERMINAL if "SLURM_PTY_PORT" in environ and "RANK" not in environ else peers.MEETING_SECONDS,
    )


def tell(text: str, code: int) -> None:
    """Let the other ranks know that this one ends, so that they do, too."""
    if _peers is not None:
        _peers.tell(text, code)


def heard(seconds: float) -> peers.Failure | None:
    """Why another rank has ended, if it said so before or does within so many seconds."""
    return None if _peers is None else _peers.heard(seconds)


def device_index(local_rank: int, local_size: int, visible: int) -> int:
    """Number of this rank's device among the `visible` ones; local_size: ranks on this machine.

    `srun --gpus-per-task=1` shows each task one device, number 0; where all see the same one, NCCL refuses ("Duplicate GPU"). Raises
    ValueError when several are visible and ranks would share some.
    """
    if visible == 1:
        return 0
    if local_size > visible:
        raise ValueError(
            f"{local_size} tasks on this machine see {visible} GPUs, so some would share one: ask for as many GPUs as tasks, with "
            f"#SBATCH --ntasks-per-node={visible} or --gpus-per-node={local_size} (torchrun: --nproc-per-node)"
        )
    return local_rank


def wait_longer_than(watchdog: float) -> None:
    """Let every process group made so far wait `watchdog` seconds and AFTER_WATCHDOG in a collective; 0 leaves them as they are.

    DeepSpeed makes groups of its own with torch's defaults (ten minutes for NCCL), so this is called after the engine was built.
    """
    if watchdog:
        for group in dist.distributed_c10d._world.pg_map:
            dist.set_timeout(timedelta(seconds=watchdog) + AFTER_WATCHDOG, group)


def stop() -> None:
    """Leave the process group, without which torch warns at exit and NCCL may hang, and restore the environment: a calling program may
    start other jobs, whose ranks would meet where this one's did."""
    global _peers
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    try:
        _leave_group()
    finally:
        if _peers is not None:
            _peers.close()
            _peers = None


def _leave_group() -> None:
    if not dist.is_initialized():
        return
    # DeepSpeed, where it is loaded, must forget groups made from this one, or no second start works
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()
