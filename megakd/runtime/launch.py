"""Which rank am I? The one place that knows torchrun, `deepspeed`, `srun`, submitit and a plain `python`.

Each launcher tells a process its rank in its own variables; `start` reads them, writes torch's (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT, which DeepSpeed reads as well) and joins the process group: NCCL for CUDA tensors, gloo for CPU ones.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_before: dict[str, str | None] = {}  # what `start` has overwritten in the environment, None for what was not there
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Ports of rendezvous: PORTS is prime, and all lie below 32768, where Linux begins to hand out ports to whoever connects
# (net.ipv4.ip_local_port_range). The strides keep the neighbours of a job, of a restart and of a step of one job apart.
FIRST_PORT, PORTS = 10240, 22003
RESTART_STRIDE, STEP_STRIDE = 1009, 7919
# The process group waits this much longer than the watchdog, which says more about a hang than a timeout in NCCL or gloo does.
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
    """torch's five rendezvous variables as the launcher that started this process means them, and LOCAL_WORLD_SIZE where it is known.

    A task of submitit on SLURM is a task of srun. Raises ValueError when a launcher set only some of its variables, and when SLURM's
    list of nodes does not say where the ranks meet.
    """
    if "RANK" in environ:
        found = _as_given(environ)
    elif environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in environ:
        found = _submitit_local(environ)
    # Only a step started by srun has SLURM_STEP_ID; a batch script's own `python` has SLURM_PROCID too, but it is one process.
    elif "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        found = _slurm(environ)
    else:
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    # An IPv6 address as URLs write it: torch's store would look for a host of that name.
    return {**found, "MASTER_ADDR": re.sub(r"^\[(.*)\]$", r"\1", found["MASTER_ADDR"])}


def _as_given(environ: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in TORCH_VARIABLES if name not in environ]
    if missing:
        raise ValueError(
            f"RANK is set but {', '.join(missing)} is not: start with torchrun, deepspeed or srun, or unset RANK for one process"
        )
    # torchrun's name, then the deepspeed launcher's
    here = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    return {name: environ[name] for name in TORCH_VARIABLES} | ({"LOCAL_WORLD_SIZE": here} if here else {})


def _submitit_local(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        "RANK": environ["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": environ["SUBMITIT_LOCAL_NTASKS"],
        "LOCAL_RANK": environ["SUBMITIT_LOCAL_LOCALID"],
        "LOCAL_WORLD_SIZE": environ["SUBMITIT_LOCAL_NTASKS"],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or "localhost",
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port(int(environ["SUBMITIT_LOCAL_JOB_ID"]))),
    }


def _slurm(environ: Mapping[str, str]) -> dict[str, str]:
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"]
    nodes = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_JOB_NUM_NODES") or "1")
    if nodes > 1 and environ.get("MASTER_ADDR", "").strip("[]") in LOOPBACK:
        raise ValueError(
            f"MASTER_ADDR = {environ['MASTER_ADDR']!r} in a job on {nodes} nodes: each would look for the others on itself; unset it "
            f"where the job is submitted, and the first node's name is taken"
        )
    # An array's tasks have job ids of their own here. A restarted job must not meet a stale peer of its former life.
    meeting = port(int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_RESTART_COUNT", "0")), int(environ["SLURM_STEP_ID"]))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_on_this_node(environ, int(tasks))),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(meeting),
    }


def port(job: int, restart: int = 0, step: int = 0) -> int:
    """Where the ranks of a job meet: another port for its neighbours, its restarts and its other steps; see FIRST_PORT."""
    return FIRST_PORT + (job + RESTART_STRIDE * restart + STEP_STRIDE * step) % PORTS


def _tasks_on_this_node(environ: Mapping[str, str], tasks: int) -> int:
    """From SLURM's run lengths, "2(x3),1": of the step where it says, else of one node that runs all."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
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
    """Join the process group and choose this rank's device. Returns this process's place in the world.

    timeout: how long a collective waits for the others, until `wait_longer_than` says otherwise.
    """
    found = variables(os.environ)
    rank, size, local_rank = int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        index = device_index(local_rank, int(found.get("LOCAL_WORLD_SIZE", local_rank + 1)), torch.cuda.device_count())
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
        # DeepSpeed takes LOCAL_RANK for the number of the device (its engine, zero.Init and zero/utils.py), and nothing else asks for it.
        found["LOCAL_RANK"] = str(index)
    _before.update({name: os.environ.get(name) for name in found if name not in _before})
    os.environ.update(found)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, device)


def device_index(local_rank: int, local_size: int, visible: int) -> int:
    """Number of this rank's device among the `visible` ones of this process; local_size: ranks on this machine.

    `srun --gpus-per-task=1` shows each task one device, number 0, whatever its local rank. Where all tasks see the same single one, NCCL
    itself refuses ("Duplicate GPU"). Raises ValueError when several are visible and ranks would share some.
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
    """Leave the process group; without it torch warns at exit, and NCCL may hang. The environment is as it was before `start`: a calling
    program may start other jobs, whose ranks would meet where this one's did."""
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    if not dist.is_initialized():
        return
    # DeepSpeed, where the engine has loaded it, remembers groups made from this one and must forget them, or no second start works.
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()
